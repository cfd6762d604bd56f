-- Makes one job of pg_cron, in place of the one of that name if there is one. pg_cron must be there.
-- Called by: `setup_ensure_workers_cron`, `setup_requeue_stalled_tasks_cron`. Locks and failure: pg_cron's.
create or replace function pgflow._schedule_cron_job(p_name text, p_schedule text, p_command text)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_there boolean;
begin
    execute 'select exists (select from cron.job as j where j.jobname = $1)' into v_there using p_name;
    if v_there then
        execute 'select cron.unschedule($1)' using p_name;
    end if;
    execute 'select cron.schedule($1, $2, $3)' using p_name, p_schedule, p_command;
end;
$$;
