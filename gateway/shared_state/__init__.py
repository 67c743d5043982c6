"""What the replicas of a gateway must agree on: here the memory of the only one."""
