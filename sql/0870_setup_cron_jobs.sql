-- Schedules `requeue_stalled_tasks` where pg_cron is there and has no such job yet; one that was changed stays as it is.
-- Called by: the installer. Locks: pg_cron's. Failure: a WARNING: the rest of the install does not hang on it.
do $$
declare
    v_there boolean;
begin
    if to_regprocedure('cron.schedule(text, text, text)') is not null then
        execute 'select exists (select from cron.job as j where j.jobname = ''pgflow_requeue_stalled_tasks'')' into v_there;
        if not v_there then
            perform pgflow.setup_requeue_stalled_tasks_cron();
        end if;
    end if;
exception
    when others then
        raise warning 'pgflow.requeue_stalled_tasks is not scheduled with pg_cron: %', sqlerrm;
end;
$$;
