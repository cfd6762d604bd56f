-- What a worker gets for each task it may run. Called by: `start_tasks`, `poll_for_tasks`. Locks, failure: none.
do $$
begin
    if to_regtype('pgflow.step_task_record') is null then
        create type pgflow.step_task_record as (
            flow_slug  text,
            run_id     uuid,
            step_slug  text,
            input      jsonb,
            msg_id     bigint,
            task_index integer
        );
    end if;
end;
$$;
