"""Who knows a user's password: the gateway itself, or Supabase Auth."""
