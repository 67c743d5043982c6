"""One file per revision; none is changed once it is released."""
