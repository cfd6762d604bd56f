-- Somebody else's `realtime.send` is replaced only if that was asked for (`flowgate install --events-only`, which says
-- `set local flowgate.replace_send = 'on'`), Supabase's own never.
-- Called by: the installer. Locks: the function's catalog rows. Failure: aborts the install.
-- Dropped rather than replaced: it would stay its owner's, and run with that role's rights.
do $$
declare
    v_send record;
begin
    select p.oid, p.proowner::regrole::text as owner, p.proacl is null as for_all,
        array(select case grantee when 0 then 'public' else grantee::regrole::text end
              from pg_catalog.aclexplode(p.proacl) where privilege_type = 'EXECUTE' and grantee <> p.proowner) as grantees
    into v_send
    from pg_catalog.pg_proc as p
    where p.oid = to_regprocedure('realtime.send(jsonb, text, text, boolean)')
      and p.prosrc not like '%insert into flowgate.event%';
    if not found then
        return;
    end if;
    if to_regclass('realtime.subscription') is not null or to_regclass('realtime.schema_migrations') is not null then
        raise exception 'realtime.send here is Supabase''s own, which is not replaced'
            using errcode = 'object_not_in_prerequisite_state',
                hint = 'Follow runs by Supabase Realtime here, or install into a database without it.';
    end if;
    if current_setting('flowgate.replace_send', true) is distinct from 'on' then
        raise exception 'realtime.send(jsonb, text, text, boolean) is there, and not flowgate''s'
            using errcode = 'duplicate_function',
                hint = '`flowgate install --events-only` replaces it; --uninstall brings it back.';
    end if;
    insert into flowgate.replaced (object, definition, owner, grantees)
    values ('realtime.send', pg_get_functiondef(v_send.oid), v_send.owner,
        case when not v_send.for_all then v_send.grantees end)
    on conflict (object) do update
    set definition = excluded.definition, owner = excluded.owner, grantees = excluded.grantees;
    drop function realtime.send(jsonb, text, text, boolean);
end;
$$;
