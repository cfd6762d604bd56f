-- Deletes what pg_cron has logged about pgflow's own jobs more than `retention_hours` ago. Returns how many entries.
-- Called by: cron (`setup_ensure_workers_cron`), hourly. Locks: the entries. Failure: the caller's. Without pg_cron there is
-- nothing to delete, which a NOTICE tells.
create or replace function pgflow.cleanup_ensure_workers_logs(retention_hours integer default 24)
returns table (cron_deleted bigint)
language plpgsql
volatile
set search_path = ''
as $$
begin
    cron_deleted := 0;
    if to_regclass('cron.job_run_details') is null or to_regclass('cron.job') is null then
        raise notice 'pgflow.cleanup_ensure_workers_logs has nothing to delete: pg_cron is not installed';
    else
        execute
            'delete from cron.job_run_details as d using cron.job as j'
            ' where j.jobid = d.jobid and j.jobname like ''pgflow\_%'''
            '   and d.end_time < now() - make_interval(hours => $1)'
        using retention_hours;
        get diagnostics cron_deleted = row_count;
    end if;
    return next;
end;
$$;
