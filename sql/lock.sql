-- Stops the world for the rest of the transaction: every table of the outbox and of pgflow's core, as far as there are any.
-- Called by: the installer and `--uninstall`, first of all in their transaction. Locks: ACCESS EXCLUSIVE on all of them.
-- Failure: after 30 s 55P03; nothing was changed.
--
-- Why not let each file lock what it alters: workers take these tables in an order of their own, so an upgrade that came by
-- them one after the other would deadlock with a worker now and then, and a worker that loses counts it as a failed try.
-- Here nothing is held while something is waited for, but for less than `deadlock_timeout`; what was got is then let go.
do $$
declare
    v_timeout  text := current_setting('lock_timeout');
    v_deadline timestamptz := clock_timestamp() + interval '30 s';
    v_tables   text;
begin
    select string_agg(c.oid::regclass::text, ', ' order by n.nspname desc, c.relname)
    into v_tables
    from pg_catalog.pg_class as c
    join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p') and not c.relispartition
      and (n.nspname = 'pgflow' or n.nspname = 'flowgate' and c.relname <> 'installed')
      and pg_catalog.pg_has_role(c.relowner, 'usage');
    if v_tables is null then
        return;
    end if;

    perform set_config('lock_timeout', '300ms', true);
    loop
        begin
            execute 'lock table ' || v_tables || ' in access exclusive mode';
            exit;
        exception
            when lock_not_available or deadlock_detected then
                if clock_timestamp() > v_deadline then
                    raise;
                end if;
        end;
        perform pg_sleep(0.05 + random() * 0.1);
    end loop;
    perform set_config('lock_timeout', v_timeout, true);
end;
$$;
