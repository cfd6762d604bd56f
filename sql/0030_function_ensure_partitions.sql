-- Makes the outbox's partitions for today and the days ahead, and empties event_default into the days its rows belong to.
-- Returns how many partitions were made.
-- Called by: the installer, Flowgate's maintenance once a day or oftener; harmless to repeat.
-- Locks: SHARE UPDATE EXCLUSIVE on the outbox and ACCESS EXCLUSIVE on event_default (ATTACH, not CREATE … PARTITION OF,
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
    v_day       date;
    v_partition text;
    v_made      integer := 0;
begin
    for v_day in
        select current_date + ahead from generate_series(0, greatest(ensure_partitions.days_ahead, 0)) as ahead
        union
        select distinct stray.inserted_at::date from flowgate.event_default as stray
        order by 1
    loop
        v_partition := 'event_' || to_char(v_day, 'YYYYMMDD');
        if to_regclass('flowgate.' || v_partition) is not null then
            continue;
        end if;
        begin
            -- Taken in the order ATTACH would, before rows are moved: an upgrade of the lock later could deadlock.
            lock table flowgate.event in share update exclusive mode;
            lock table flowgate.event_default in access exclusive mode;
            execute format('create table flowgate.%I (like flowgate.event including defaults)', v_partition);
            execute format(
                'with stray as ('
                '  delete from flowgate.event_default where inserted_at >= %1$L and inserted_at < %2$L returning *)'
                ' insert into flowgate.%3$I select * from stray',
                v_day::timestamptz, (v_day + 1)::timestamptz, v_partition);
            execute format(
                'alter table flowgate.event attach partition flowgate.%I for values from (%L) to (%L)',
                v_partition, v_day::timestamptz, (v_day + 1)::timestamptz);
            v_made := v_made + 1;
        exception
            when lock_not_available or duplicate_table then
                raise notice 'outbox partition % left for the next call: %', v_partition, sqlerrm;
        end;
    end loop;
    return v_made;
end;
$$;

revoke all on function flowgate.ensure_partitions(integer) from public;

do $$ begin perform flowgate.ensure_partitions(); end $$;
