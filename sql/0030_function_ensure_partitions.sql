-- One table's part of `flowgate.ensure_partitions`: `days` from today on, and those whose rows are in `strays`, its default
-- partition. `named`: of a day's partition, for to_char.
create or replace function flowgate.ensure_days(parent regclass, strays regclass, named text, days_ahead integer)
returns integer
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_schema    text := (select c.relnamespace::regnamespace from pg_catalog.pg_class as c where c.oid = ensure_days.parent);
    v_day       date;
    v_partition text;
    v_made      integer := 0;
begin
    for v_day in
        execute format(
            'select current_date + ahead from generate_series(0, greatest($1, 0)) as ahead'
            ' union'
            ' select distinct stray.inserted_at::date from %s as stray'
            ' order by 1', ensure_days.strays)
        using ensure_days.days_ahead
    loop
        v_partition := v_schema || '.' || to_char(v_day, ensure_days.named);
        if to_regclass(v_partition) is not null then
            continue;
        end if;
        begin
            -- Taken in the order ATTACH would, before rows are moved: an upgrade of the lock later could deadlock.
            execute format('lock table %s in share update exclusive mode', ensure_days.parent);
            execute format('lock table %s in access exclusive mode', ensure_days.strays);
            execute format('create table %s (like %s including defaults)', v_partition, ensure_days.parent);
            execute format(
                'with stray as ('
                '  delete from %1$s where inserted_at >= %2$L and inserted_at < %3$L returning *)'
                ' insert into %4$s select * from stray',
                ensure_days.strays, v_day::timestamptz, (v_day + 1)::timestamptz, v_partition);
            execute format(
                'alter table %s attach partition %s for values from (%L) to (%L)',
                ensure_days.parent, v_partition, v_day::timestamptz, (v_day + 1)::timestamptz);
            v_made := v_made + 1;
        exception
            when lock_not_available or duplicate_table then
                raise notice 'partition % left for the next call: %', v_partition, sqlerrm;
        end;
    end loop;
    return v_made;
end;
$$;

revoke all on function flowgate.ensure_days(regclass, regclass, text, integer) from public;

-- Makes the outbox's partitions for today and the days ahead, and empties event_default into the days its rows belong to; those
-- of realtime.messages too, where that is ours. Returns how many partitions of the outbox were made.
-- Called by: the installer, Flowgate's maintenance once a day or oftener; harmless to repeat.
-- Locks: SHARE UPDATE EXCLUSIVE on the table and ACCESS EXCLUSIVE on its default partition (ATTACH, not CREATE … PARTITION OF,
-- which would lock out every sender). Waits at most `lock_timeout` for each; a day it can't get is left for the next call.
-- Failure: rolls back that day only. Events are safe meanwhile: the default partition takes them.
create or replace function flowgate.ensure_partitions(days_ahead integer default 7)
returns integer
language plpgsql
volatile
security definer
set search_path = ''
set lock_timeout = '300ms'
set timezone = 'UTC'
as $$
declare
    v_made integer := flowgate.ensure_days(
        'flowgate.event', 'flowgate.event_default', '"event_"YYYYMMDD', ensure_partitions.days_ahead);
begin
    if obj_description(to_regclass('realtime.messages')) = 'A copy of flowgate.event'
        and to_regclass('realtime.messages_default') is not null
    then
        perform flowgate.ensure_days(
            'realtime.messages', 'realtime.messages_default', '"messages_"YYYY_MM_DD', ensure_partitions.days_ahead);
    end if;
    return v_made;
end;
$$;

revoke all on function flowgate.ensure_partitions(integer) from public;

do $$ begin perform flowgate.ensure_partitions(); end $$;
