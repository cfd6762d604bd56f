-- Switches NOTIFY from SQL on or off, one for each event on its topic, for listeners that bypass Flowgate. Returns the new state.
-- Called by: an administrator; `flowgate serve` where `events.direct_notify` is true. Locks: SHARE ROW EXCLUSIVE (off: ACCESS
-- EXCLUSIVE) on flowgate.event, if the state changes: waits for running calls, at most `lock_timeout`. Failure: the caller's.
create or replace function flowgate.set_direct_notify(enabled boolean)
returns boolean
language plpgsql
volatile
security definer
set search_path = ''
set lock_timeout = '2s'
as $$
begin
    if exists (
        select from pg_catalog.pg_trigger as t
        where t.tgrelid = 'flowgate.event'::regclass and t.tgname = 'notify_directly'
    ) = set_direct_notify.enabled then
        return set_direct_notify.enabled;
    end if;
    if set_direct_notify.enabled then
        create trigger notify_directly after insert on flowgate.event
        for each row execute function flowgate.notify_directly();
    else
        drop trigger notify_directly on flowgate.event;
    end if;
    return set_direct_notify.enabled;
end;
$$;

revoke all on function flowgate.set_direct_notify(boolean) from public;
