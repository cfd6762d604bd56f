-- Has pg_cron run `requeue_stalled_tasks` at the interval given. Returns what it did.
-- Called by: the installer, where pg_cron is there; administrators. Locks: pg_cron's. Failure: the caller's, and the job is as it
-- was.
-- Without pg_cron nothing is scheduled, which a NOTICE tells; `flowgate serve` does it on a schedule of its own.
create or replace function pgflow.setup_requeue_stalled_tasks_cron(cron_interval text default '15 seconds')
returns text
language plpgsql
volatile
set search_path = ''
as $$
begin
    if to_regprocedure('cron.schedule(text, text, text)') is null then
        raise notice '% schedules nothing: it needs the extension pg_cron (flowgate serve does without)',
            'pgflow.setup_requeue_stalled_tasks_cron';
        return 'Nothing scheduled: the extension pg_cron is not installed';
    end if;

    perform pgflow._schedule_cron_job(
        'pgflow_requeue_stalled_tasks', cron_interval, 'select pgflow.requeue_stalled_tasks()');
    return format('Scheduled pgflow_requeue_stalled_tasks (every %s)', cron_interval);
end;
$$;
