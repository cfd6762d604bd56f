-- Archives the message of one task, if it still has one.
-- Called by: `complete_task` and `fail_task`, for a task that ended late. Locks: the message, last of all. Failure: the caller's.
create or replace function pgflow._archive_task_message(p_run_id uuid, p_step_slug text, p_task_index integer)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
    perform pgmq.archive(t.flow_slug::text, t.message_id::bigint)
    from pgflow.step_tasks as t
    where t.run_id = p_run_id and t.step_slug = p_step_slug and t.task_index = p_task_index
      and t.message_id is not null;
end;
$$;
