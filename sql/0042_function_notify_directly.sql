-- Trigger of flowgate.event, where `flowgate.set_direct_notify(true)` was called: NOTIFY on the topic with the payload, for
-- sessions that listen to Postgres itself.
-- Called by: the trigger. Locks: NOTIFY's, of the whole cluster, until the caller has committed. Failure: the caller's, so it
-- sends nothing that NOTIFY refuses: a payload of 8,000 bytes or more is told of without its contents (`"truncated": true`), a topic
-- that is no channel's name not at all.
create or replace function flowgate.notify_directly()
returns trigger
language plpgsql
volatile
security definer
set search_path = ''
as $$
declare
    v_payload text := new.payload::text;
begin
    if new.seq is null or octet_length(new.topic) not between 1 and 63 then
        return null;
    end if;
    if octet_length(v_payload) >= 8000 then
        v_payload := jsonb_strip_nulls(jsonb_build_object(
            'event_type', left(new.payload ->> 'event_type', 200),
            'run_id', left(new.payload ->> 'run_id', 200),
            'flow_slug', left(new.payload ->> 'flow_slug', 200),
            'step_slug', left(new.payload ->> 'step_slug', 200),
            'status', left(new.payload ->> 'status', 200),
            'truncated', true));
    end if;
    perform pg_notify(new.topic, v_payload);
    return null;
end;
$$;

revoke all on function flowgate.notify_directly() from public;
