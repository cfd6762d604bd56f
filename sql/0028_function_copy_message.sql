-- Trigger of flowgate.event: the same as a row of realtime.messages. `drop trigger copy_message on flowgate.event` saves what it
-- costs (a row more an event), until the next install.
-- Called by: the trigger, as the definer of what inserts. Locks: plain inserts. Failure: the caller's.
create or replace function flowgate.copy_message()
returns trigger
language plpgsql
volatile
security definer
set search_path = ''
as $$
begin
    insert into realtime.messages (id, topic, extension, payload, event, private, updated_at, inserted_at)
    values (
        new.message_id, new.topic, 'broadcast', new.payload, new.event, new.private,
        new.inserted_at at time zone 'UTC', new.inserted_at at time zone 'UTC'
    );
    return null;
end;
$$;

revoke all on function flowgate.copy_message() from public;

do $$
begin
    if obj_description(to_regclass('realtime.messages')) is not distinct from 'A copy of flowgate.event'
        and not exists (
            select from pg_catalog.pg_trigger as t
            where t.tgrelid = 'flowgate.event'::regclass and t.tgname = 'copy_message')
    then
        create trigger copy_message after insert on flowgate.event
        for each row when (new.seq is not null) execute function flowgate.copy_message();
    end if;
end;
$$;
