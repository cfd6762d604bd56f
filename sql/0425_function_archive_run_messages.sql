-- Archives the messages of all tasks of a run that are queued or started, and `message_id`: nothing of a failed run is worked on.
-- Called by: `complete_task` and `fail_task`, as the last thing they do when they fail a run, holding it. Locks: the messages,
-- in order of their ids. Failure: the caller's.
create or replace function pgflow._archive_run_messages(flow_slug text, run_id uuid, message_id bigint)
returns void
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
begin
    perform pgmq.archive(_archive_run_messages.flow_slug::text, array_agg(open.message_id order by open.message_id))
    from (
        select t.message_id
        from pgflow.step_tasks as t
        where t.run_id = _archive_run_messages.run_id and t.status in ('queued', 'started') and t.message_id is not null
        union
        select _archive_run_messages.message_id
        where _archive_run_messages.message_id is not null
    ) as open
    having count(*) > 0;
end;
$$;
