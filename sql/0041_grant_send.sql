-- Who could call the `realtime.send` that ours took the place of can call ours: pgflow's functions run as their callers.
-- Called by: the installer. Locks: the catalog rows of what is granted. Failure: aborts the install.
do $$
declare
    v_role text;
begin
    for v_role in
        select unnest(coalesce(r.grantees, array['public']) || r.owner)
        from flowgate.replaced as r
        where r.object = 'realtime.send'
    loop
        continue when v_role <> 'public' and to_regrole(v_role) is null;
        execute format('grant execute on function realtime.send(jsonb, text, text, boolean) to %s', v_role);
    end loop;
end;
$$;
