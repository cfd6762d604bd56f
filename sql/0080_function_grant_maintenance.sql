-- Lets a role keep the outbox and pgflow in order: what `flowgate serve` does by its control role. Repeat after an upgrade.
-- The role needs no right on any table: the functions are their owner's.
-- Called by: an administrator (the owner of the objects). Locks: the catalog rows of what is granted. Failure: the caller's.
create or replace function flowgate.grant_maintenance(role regrole)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_schema   text;
    v_function regprocedure;
begin
    foreach v_schema in array array['flowgate', 'pgflow'] loop
        continue when to_regnamespace(v_schema) is null;
        execute format('grant usage on schema %I to %s', v_schema, grant_maintenance.role);
    end loop;
    for v_function in
        select wanted.name::regprocedure
        from unnest(array[
            'flowgate.ensure_partitions(integer)', 'flowgate.drop_partitions(interval)',
            'flowgate.forget_topics(interval, integer)', 'flowgate.stalled_tasks()',
            'flowgate.prune(interval, integer)', 'flowgate.set_direct_notify(boolean)',
            'flowgate.requeue_stalled_tasks(integer)',
            'pgflow.requeue_stalled_tasks()'
        ]) as wanted(name)
        where to_regprocedure(wanted.name) is not null
    loop
        execute format('grant execute on function %s to %s', v_function, grant_maintenance.role);
    end loop;
end;
$$;

revoke all on function flowgate.grant_maintenance(regrole) from public;
