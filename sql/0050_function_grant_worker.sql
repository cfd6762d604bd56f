-- Lets a role work flows: start runs, poll, start, complete and fail tasks, add steps. Repeat after an upgrade.
-- Making a flow makes its queue's tables, which belong to whoever makes them: left to the owner, so that every worker may use
-- them.
-- Called by: an administrator (the owner of the objects). Locks: the catalog rows of what is granted. Failure: the caller's.
-- What it needs beyond pgflow's own tables: EXECUTE on realtime.send and flowgate.publish (definer's functions: no right on the
-- outbox) and
-- pgmq's queues, those of today and those that the role which calls this makes later.
create or replace function flowgate.grant_worker(role regrole)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_statement text;
    v_schema    text;
begin
    foreach v_statement in array array[
        'grant usage on schema realtime to %1$s',
        'grant execute on function realtime.send(jsonb, text, text, boolean) to %1$s',
        'grant usage on schema flowgate to %1$s',
        'grant execute on function flowgate.publish(text, text[], jsonb[]) to %1$s'
    ] loop
        execute format(v_statement, grant_worker.role);
    end loop;

    foreach v_schema in array array['pgflow', 'pgmq'] loop
        continue when to_regnamespace(v_schema) is null;
        foreach v_statement in array array[
            'grant usage on schema %2$I to %1$s',
            'grant select, insert, update, delete on all tables in schema %2$I to %1$s',
            'grant usage, select on all sequences in schema %2$I to %1$s',
            'grant execute on all functions in schema %2$I to %1$s',
            'alter default privileges in schema %2$I grant select, insert, update, delete on tables to %1$s',
            'alter default privileges in schema %2$I grant usage, select on sequences to %1$s'
        ] loop
            execute format(v_statement, grant_worker.role, v_schema);
        end loop;
    end loop;
end;
$$;

revoke all on function flowgate.grant_worker(regrole) from public;
