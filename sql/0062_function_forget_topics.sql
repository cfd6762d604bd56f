-- Forgets counters of topics that are over, at most `max_topics`. Returns how many. A topic is over when its run has ended and it
-- has been silent for `retention`; topics that aren't runs are kept 90 days longer, as nothing says that they end. A run that has
-- not ended keeps its counter however old, so that its `seq` never starts again.
-- Called by: Flowgate's maintenance, until it returns less than `max_topics`; `flowgate.drop_partitions`, once.
-- Locks: the counters, SKIP LOCKED. Failure: the caller's.
create or replace function flowgate.forget_topics(retention interval, max_topics integer default 10000)
returns integer
language plpgsql
volatile
security definer
set search_path = ''
as $$
declare
    v_forgotten integer;
begin
    if forget_topics.retention is null or forget_topics.retention < interval '0' then
        raise exception 'retention must be a positive interval, not %', forget_topics.retention
            using errcode = 'invalid_parameter_value';
    end if;
    delete from flowgate.topic as t
    where t.topic = any (array(
        select old.topic
        from flowgate.topic as old
        where (old.updated_at < now() - forget_topics.retention and old.ended)
           or (old.updated_at < now() - forget_topics.retention - interval '90 days'
               and old.topic not like 'pgflow:run:%')
        limit forget_topics.max_topics
        for update skip locked));
    get diagnostics v_forgotten = row_count;
    return v_forgotten;
end;
$$;

revoke all on function flowgate.forget_topics(interval, integer) from public;
