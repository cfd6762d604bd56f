-- Drops the outbox partitions that ended more than `retention` ago, and forgets counters of topics that are over.
-- Returns how many partitions were dropped.
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
    v_partition record;
    v_dropped   integer := 0;
begin
    if drop_partitions.retention is null or drop_partitions.retention < interval '0' then
        raise exception 'retention must be a positive interval, not %', drop_partitions.retention
            using errcode = 'invalid_parameter_value';
    end if;
    -- Strays first get their own day, so that they too go by DROP.
    perform flowgate.ensure_partitions(0);

    for v_partition in
        select c.relname, to_date(substr(c.relname, 7), 'YYYYMMDD') as day
        from pg_catalog.pg_inherits as i
        join pg_catalog.pg_class as c on c.oid = i.inhrelid
        where i.inhparent = 'flowgate.event'::regclass and c.relname ~ '^event_[0-9]{8}$'
        order by c.relname
    loop
        continue when (v_partition.day + 1)::timestamptz > now() - drop_partitions.retention;
        begin
            execute format('drop table flowgate.%I', v_partition.relname);
            v_dropped := v_dropped + 1;
        exception
            when lock_not_available then
                raise notice 'outbox partition % is busy, left for the next call', v_partition.relname;
        end;
    end loop;

    perform flowgate.forget_topics(drop_partitions.retention);
    return v_dropped;
end;
$$;

revoke all on function flowgate.drop_partitions(interval) from public;
