-- Takes out what the installer put in, data included: pgflow's runs and definitions, the outbox, and Flowgate's own objects.
-- pgmq and its queues stay, as they are pgmq's; so does a `realtime` schema in which anything is left that is not ours.
-- Called by: `flowgate install --uninstall`, in one transaction. Locks: everything it drops. Failure: nothing is dropped.
-- Where pgflow was installed by somebody else, flowgate.installed has no row for it, and it stays.
do $$
begin
    -- Nested: a condition is planned as one query, which would look for the table even where there is none.
    if to_regclass('flowgate.installed') is not null then
        if exists (select from flowgate.installed as i where i.component = 'pgflow') then
            -- Whoever may not look into pg_cron has no job there.
            if exists (
                select from pg_catalog.pg_class as c
                where c.relnamespace = (select n.oid from pg_catalog.pg_namespace as n where n.nspname = 'cron')
                  and c.relname = 'job' and has_schema_privilege(c.relnamespace, 'usage')
                  and has_table_privilege(c.oid, 'select')
            ) then
                execute
                    'select cron.unschedule(j.jobname) from cron.job as j'
                    ' where j.jobname in'
                    '  (''pgflow_requeue_stalled_tasks'', ''pgflow_ensure_workers'', ''pgflow_cleanup_logs'')';
            end if;
            drop schema if exists pgflow cascade;
        end if;
    end if;

    if exists (
        select from pg_catalog.pg_depend as d
        join pg_catalog.pg_rewrite as w on d.classid = 'pg_rewrite'::regclass and w.oid = d.objid
        where w.ev_class = to_regclass('realtime.messages') and d.refobjid = to_regclass('flowgate.event')
    ) then
        drop view realtime.messages;
    end if;

    if exists (
        select from pg_catalog.pg_proc as p
        where p.oid = to_regprocedure('realtime.send(jsonb, text, text, boolean)')
          and p.prosrc like '%insert into flowgate.event%'
    ) then
        drop function realtime.send(jsonb, text, text, boolean);
    end if;

    if to_regnamespace('realtime') is not null
        and not exists (select from pg_catalog.pg_class as c where c.relnamespace = to_regnamespace('realtime'))
        and not exists (select from pg_catalog.pg_proc as p where p.pronamespace = to_regnamespace('realtime'))
        and not exists (
            select from pg_catalog.pg_type as t
            where t.typnamespace = to_regnamespace('realtime') and t.typelem = 0)
    then
        drop schema realtime;
    end if;

    drop schema if exists flowgate cascade;
end;
$$;
