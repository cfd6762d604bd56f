-- Has pg_cron run `ensure_workers` at the interval given and `cleanup_ensure_workers_logs` every hour. Returns what it did.
-- Called by: administrators on Supabase. Locks: pg_cron's. Failure: the caller's, and neither job is changed.
-- Without pg_cron, or pg_net for the job to work with, nothing is scheduled, which a NOTICE tells.
create or replace function pgflow.setup_ensure_workers_cron(cron_interval text default '1 second')
returns text
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_missing text := case
        when to_regprocedure('cron.schedule(text, text, text)') is null then 'pg_cron'
        when not exists (
            select from pg_catalog.pg_proc as p
            where p.pronamespace = to_regnamespace('net') and p.proname = 'http_post') then 'pg_net'
    end;
begin
    if v_missing is not null then
        raise notice 'pgflow.setup_ensure_workers_cron schedules nothing: it needs the extension %', v_missing;
        return format('Nothing scheduled: the extension %s is not installed', v_missing);
    end if;

    perform pgflow._schedule_cron_job('pgflow_ensure_workers', cron_interval, 'select * from pgflow.ensure_workers()');
    perform pgflow._schedule_cron_job(
        'pgflow_cleanup_logs', '0 * * * *', 'select * from pgflow.cleanup_ensure_workers_logs()');
    return format('Scheduled pgflow_ensure_workers (every %s) and pgflow_cleanup_logs (hourly)', cron_interval);
end;
$$;
