-- Whether a text may name a flow or a step.
-- Called by: check constraints of flows and steps. Locks: none. Failure: none.
create or replace function pgflow.is_valid_slug(slug text)
returns boolean
language plpgsql
immutable
parallel safe
set search_path = ''
as $$
begin
    return is_valid_slug.slug is not null
       and length(is_valid_slug.slug) between 1 and 128
       and is_valid_slug.slug ~ '^[a-zA-Z_][a-zA-Z0-9_]*$'
       and is_valid_slug.slug <> 'run';        -- a step's input keeps the run's own input under "run"
end;
$$;
