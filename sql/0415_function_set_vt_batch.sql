-- Sets when each of several messages becomes visible: now plus its offset in seconds. Returns the messages changed.
-- Called by: clients. Locks: the messages, in order of their ids. Failure: the caller's; unknown ids are passed over.
--
-- Which columns a message has depends on pgmq's version, so they are matched by name.
-- What 0.14 has in its place returns a table, which `create or replace` can't change.
do $$
begin
    if exists (
        select from pg_catalog.pg_proc as p
        where p.oid = to_regprocedure('pgflow.set_vt_batch(text, bigint[], integer[])')
          and p.prorettype <> 'pgmq.message_record'::regtype
    ) then
        drop function pgflow.set_vt_batch(text, bigint[], integer[]);
    end if;
end;
$$;

create or replace function pgflow.set_vt_batch(queue_name text, msg_ids bigint[], vt_offsets integer[])
returns setof pgmq.message_record
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
begin
    if coalesce(cardinality(set_vt_batch.msg_ids), 0) = 0 or coalesce(cardinality(set_vt_batch.vt_offsets), 0) = 0 then
        return;
    end if;
    if cardinality(set_vt_batch.msg_ids) <> cardinality(set_vt_batch.vt_offsets) then
        raise exception 'msg_ids length (%) must equal vt_offsets length (%)',
            cardinality(set_vt_batch.msg_ids), cardinality(set_vt_batch.vt_offsets);
    end if;

    return query execute format(
        'with held as materialized ('
        '  select m.msg_id from pgmq.%1$I as m where m.msg_id = any ($1) order by m.msg_id for no key update), '
        'changed as ('
        '  update pgmq.%1$I as m set vt = clock_timestamp() + make_interval(secs => wanted.seconds)'
        '  from held join unnest($1, $2) as wanted(msg_id, seconds) on wanted.msg_id = held.msg_id'
        '  where m.msg_id = held.msg_id'
        '  returning to_jsonb(m) as message) '
        'select told.* from changed, jsonb_populate_record(null::pgmq.message_record, changed.message) as told',
        pgmq.format_table_name(set_vt_batch.queue_name::text, 'q'::text))
    using set_vt_batch.msg_ids, set_vt_batch.vt_offsets;
end;
$$;
