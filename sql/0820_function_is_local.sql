-- Whether this database was started by Supabase's command line on somebody's own machine: it then has a secret everybody knows.
-- Called by: `ensure_flow_compiled`, `ensure_workers`. Locks: none. Failure: none; elsewhere it is false.
create or replace function pgflow.is_local()
returns boolean
language plpgsql
stable
set search_path = ''
as $$
begin
    return coalesce(
        current_setting('app.settings.jwt_secret', true) = 'super-secret-jwt-token-with-at-least-32-characters-long',
        false);
end;
$$;
