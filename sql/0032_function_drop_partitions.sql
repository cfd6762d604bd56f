-- One table's part of `flowgate.drop_partitions`: those of its partitions that are named after a day.
create or replace function flowgate.drop_days(parent regclass, retention interval)
returns integer
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_partition record;
    v_dropped   integer := 0;
begin
    for v_partition in
        select c.oid::regclass as name, to_date(translate(substring(c.relname from '^[a-z]+_([0-9_]+)$'), '_', ''), 'YYYYMMDD') as day
        from pg_catalog.pg_inherits as i
        join pg_catalog.pg_class as c on c.oid = i.inhrelid
        where i.inhparent = drop_days.parent and c.relname ~ '^[a-z]+_([0-9]{8}|[0-9]{4}_[0-9]{2}_[0-9]{2})$'
        order by c.relname
    loop
        continue when (v_partition.day + 1)::timestamptz > now() - drop_days.retention;
        begin
            execute format('drop table %s', v_partition.name);
            v_dropped := v_dropped + 1;
        exception
            when lock_not_available then
                raise notice 'partition % is busy, left for the next call', v_partition.name;
        end;
    end loop;
    return v_dropped;
end;
$$;

revoke all on function flowgate.drop_days(regclass, interval) from public;

-- Drops the outbox partitions that ended more than `retention` ago (of realtime.messages, if that is ours: three days at most),
-- and forgets counters of topics that are over. Returns how many partitions of the outbox were dropped.
-- Called by: Flowgate's maintenance. Locks: ACCESS EXCLUSIVE on the outbox for the moment of each drop, waiting at most
-- `lock_timeout`; a partition that is busy is left for the next call. Counters: those of
-- `flowgate.forget_topics`, at most 10,000 a call.
-- Failure: rolls back that partition only.
create or replace function flowgate.drop_partitions(retention interval)
returns integer
language plpgsql
volatile
security definer
set search_path = ''
set lock_timeout = '300ms'
set timezone = 'UTC'
as $$
declare
    v_dropped integer;
begin
    if drop_partitions.retention is null or drop_partitions.retention < interval '0' then
        raise exception 'retention must be a positive interval, not %', drop_partitions.retention
            using errcode = 'invalid_parameter_value';
    end if;
    -- Strays first get their own day, so that they too go by DROP.
    perform flowgate.ensure_partitions(0);

    v_dropped := flowgate.drop_days('flowgate.event', drop_partitions.retention);
    if obj_description(to_regclass('realtime.messages')) = 'A copy of flowgate.event' then
        perform flowgate.drop_days('realtime.messages', least(drop_partitions.retention, interval '3 days'));
    end if;

    perform flowgate.forget_topics(drop_partitions.retention);
    return v_dropped;
end;
$$;

revoke all on function flowgate.drop_partitions(interval) from public;
