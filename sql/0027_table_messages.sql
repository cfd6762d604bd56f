-- A copy of what `realtime.send` and pgflow's functions send, as a table with the columns and the partitioning of Supabase's
-- realtime.messages, for whoever reads that, hangs a trigger on it or gives it partitions of his own.
-- Left out where a relation of that name exists that is not ours (its comment says so). Supabase too keeps these for three days.
-- Written by: the trigger `copy_message` of the outbox. Read by: clients; nothing of Flowgate's. Locks: plain inserts.
-- Failure: the writer's; the default partition takes what no other does.
do $$
begin
    -- What an earlier version had in its place.
    if exists (
        select from pg_catalog.pg_depend as d
        join pg_catalog.pg_rewrite as w on d.classid = 'pg_rewrite'::regclass and w.oid = d.objid
        where w.ev_class = to_regclass('realtime.messages') and d.refobjid = to_regclass('flowgate.event')
    ) then
        drop view realtime.messages;
    end if;
    if to_regclass('realtime.messages') is not null then
        if obj_description(to_regclass('realtime.messages')) is distinct from 'A copy of flowgate.event' then
            raise notice 'realtime.messages exists and is not flowgate''s: left alone';
        end if;
        return;
    end if;
    create table realtime.messages (
        id          uuid not null default gen_random_uuid(),
        topic       text not null,
        extension   text not null,
        payload     jsonb,
        event       text,
        private     boolean default false,
        updated_at  timestamp not null default now(),
        inserted_at timestamp not null default now()
    ) partition by range (inserted_at);
    comment on table realtime.messages is 'A copy of flowgate.event';
    create table realtime.messages_default partition of realtime.messages default;
end;
$$;
