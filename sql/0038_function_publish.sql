-- Publishes events of one topic, in this order: rows in the outbox, in the caller's own transaction, and a wake-up if a reader
-- sleeps. `events` and `payloads` have as many elements.
-- Called by: pgflow's functions. Locks: the topic's counter row, until the caller commits, so events of one topic are numbered
-- 1, 2, 3 … in commit order. pgflow holds the run's row by then, so its callers never wait here.
-- Failure: the caller's. What a run has done and what its events tell must not differ, and a savepoint around them would cost
-- more than writing them (and a transaction id each). `realtime.send`, which anybody calls, has one.
--
-- SECURITY DEFINER, so that callers need no right on the outbox; PUBLIC may not execute it (an event could be forged).
-- A plain role that installed everything just works; others get EXECUTE by `flowgate.grant_worker`.
--
-- The wake-up has a constant payload, so Postgres keeps one per transaction. Whether a reader sleeps is looked up after the
-- inserts: a transaction that finds it awake had its id before the reader fell asleep, and the reader looks on until those have
-- ended. An old snapshot can't tell, so at the stricter isolation levels it is always notified. A session that a Flowgate carries
-- names that one's reader in `flowgate.wake`: it sees the commit itself and need not be told.
create or replace function flowgate.publish(topic text, events text[], payloads jsonb[])
returns void
language plpgsql
volatile
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_count integer := cardinality(publish.events);
    v_ended boolean := publish.events && array['run:completed', 'run:failed'];
    v_seq   bigint;
begin
    update flowgate.topic as counter
    set seq = counter.seq + v_count, ended = counter.ended or v_ended, updated_at = now()
    where counter.topic = publish.topic
    returning counter.seq - v_count into v_seq;
    if not found then
        insert into flowgate.topic as counter (topic, seq, ended)
        values (publish.topic, v_count, v_ended)
        on conflict (topic) do update
            set seq = counter.seq + excluded.seq, ended = counter.ended or excluded.ended, updated_at = excluded.updated_at
        returning counter.seq - v_count into v_seq;
    end if;

    if v_count = 1 then
        insert into flowgate.event (topic, seq, event, payload)
        values (publish.topic, v_seq + 1, publish.events[1], publish.payloads[1]);
    else
        insert into flowgate.event (topic, seq, event, payload)
        select publish.topic, v_seq + told.place, told.event, told.payload
        from unnest(publish.events, publish.payloads) with ordinality as told(event, payload, place);
    end if;

    if current_setting('flowgate.wake', true) is distinct from 'off'
        and (current_setting('transaction_isolation') <> 'read committed'
             or exists (select from flowgate.reader as r
                        where r.asleep and r.reader_id::text is distinct from current_setting('flowgate.wake', true)))
    then
        perform pg_notify('flowgate_wake', '');
    end if;
end;
$$;

revoke all on function flowgate.publish(text, text[], jsonb[]) from public;

-- Who was let work flows before this function was there goes on working them.
do $$
declare
    v_role regrole;
begin
    for v_role in
        select grant_of.grantee::regrole
        from pg_catalog.pg_proc as p
        cross join lateral pg_catalog.aclexplode(p.proacl) as grant_of
        where p.oid = to_regprocedure('realtime.send(jsonb, text, text, boolean)')
          and grant_of.privilege_type = 'EXECUTE' and grant_of.grantee <> 0 and grant_of.grantee <> p.proowner
    loop
        execute format('grant usage on schema flowgate to %s', v_role);
        execute format('grant execute on function flowgate.publish(text, text[], jsonb[]) to %s', v_role);
    end loop;
end;
$$;
