-- Publishes one event, as `flowgate.publish` does several: a row in the outbox, in the caller's own transaction, and a wake-up if
-- a reader sleeps.
-- Called by: pgflow's functions; anybody who was granted EXECUTE. Locks: the topic's counter row, until the caller commits,
-- so events of one topic are numbered 1, 2, 3 … in commit order. pgflow holds the run's row by then, so its callers never
-- wait here; a transaction that sends to several topics should do so in one order.
-- Failure: warns and goes on without the event, since an event must never fail the work it tells of; the savepoint gives the
-- number back, so no gap. Only what Postgres wants the whole transaction repeated for (class 40: serialization failure,
-- deadlock) is raised: swallowing it would lose an event that the repetition sends.
--
-- SECURITY DEFINER, so that callers need no right on the outbox; PUBLIC may not execute it (an event could be forged).
-- A plain role that installed everything just works; others get EXECUTE by `flowgate.grant_worker`.
create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default false)
returns void
language plpgsql
volatile
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_seq   bigint;
    v_ended boolean := send.event in ('run:completed', 'run:failed');
begin
    insert into flowgate.topic as counter (topic, seq, ended)
    values (send.topic, 1, v_ended)
    on conflict (topic) do update
        set seq = counter.seq + 1, ended = counter.ended or excluded.ended, updated_at = excluded.updated_at
    returning counter.seq into v_seq;

    insert into flowgate.event (topic, seq, event, payload, private)
    values (send.topic, v_seq, send.event, send.payload, coalesce(send.private, false));

    if current_setting('flowgate.wake', true) is distinct from 'off'
        and (current_setting('transaction_isolation') <> 'read committed'
             or exists (select from flowgate.reader as r
                        where r.asleep and r.reader_id::text is distinct from current_setting('flowgate.wake', true)))
    then
        perform pg_notify('flowgate_wake', '');
    end if;
exception
    when transaction_rollback or serialization_failure or deadlock_detected then
        raise;
    when others then
        raise warning 'event "%" on topic "%" was not sent: %', send.event, send.topic, sqlerrm
            using errcode = sqlstate;
end;
$$;

revoke all on function realtime.send(jsonb, text, text, boolean) from public;
