-- Schema that pgflow expects `realtime.send` in. On Supabase it exists already and stays as it is.
-- Called by: the installer. Locks: the catalog row, until the installer commits. Failure: aborts the install.
create schema if not exists realtime;
