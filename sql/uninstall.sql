-- Takes out what the installer put in, data included: pgflow's runs and definitions, the outbox, and Flowgate's own objects.
-- pgmq and its queues stay, as they are pgmq's; so does a `realtime` schema in which anything is left that is not ours.
-- Called by: `flowgate install --uninstall`, in one transaction. Locks: everything it drops. Failure: nothing is dropped.
-- Where pgflow was installed by somebody else, flowgate.installed has no row for it, and it stays.
do $$
declare
    v_replaced record;
    v_role     text;
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

    if obj_description(to_regclass('realtime.messages')) = 'A copy of flowgate.event' then
        drop table realtime.messages;
    end if;
    -- What an earlier version had in its place.
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
        -- What was there before comes back, its owner's and with its grants.
        if to_regclass('flowgate.replaced') is not null then
            for v_replaced in execute 'select * from flowgate.replaced where object = ''realtime.send''' loop
                execute v_replaced.definition;
                if v_replaced.grantees is not null then
                    revoke all on function realtime.send(jsonb, text, text, boolean) from public;
                    foreach v_role in array v_replaced.grantees loop
                        continue when v_role <> 'public' and to_regrole(v_role) is null;
                        execute format('grant execute on function realtime.send(jsonb, text, text, boolean) to %s', v_role);
                    end loop;
                end if;
                if to_regrole(v_replaced.owner) is not null then
                    execute format('alter function realtime.send(jsonb, text, text, boolean) owner to %s', v_replaced.owner);
                end if;
            end loop;
        end if;
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
