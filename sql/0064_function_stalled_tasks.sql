-- How many tasks were given up because their workers went away again and again: their runs wait until somebody looks.
-- Called by: Flowgate's maintenance, for a metric. Locks: none. Failure: the caller's.
-- At the API level 0.7 that is flowgate.requeued_task and an index; at 0.14 pgflow keeps it in step_tasks without one, so that it
-- costs a scan of that table: not for every few seconds.
create or replace function flowgate.stalled_tasks()
returns bigint
language plpgsql
stable
security definer
set search_path = ''
as $$
declare
    v_count bigint;
begin
    if exists (
        select from pg_catalog.pg_attribute as a
        where a.attrelid = to_regclass('pgflow.step_tasks') and a.attname = 'permanently_stalled_at'
          and not a.attisdropped
    ) then
        execute 'select count(*) from pgflow.step_tasks as t'
            ' where t.permanently_stalled_at is not null and t.status = ''started'''
        into v_count;
    else
        select count(*) into v_count from flowgate.requeued_task as q where q.permanently_stalled_at is not null;
    end if;
    return v_count;
end;
$$;

revoke all on function flowgate.stalled_tasks() from public;
