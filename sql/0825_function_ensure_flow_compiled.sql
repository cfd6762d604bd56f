-- Sees to it that a flow is defined as its code says: makes it, finds it as it should be, or, where data may be lost, makes it
-- anew. Else says what differs and changes nothing. Returns {"status": "compiled" | "verified" | "recompiled" | "mismatch",
-- "differences": […]}.
-- Called by: workers when they start. Locks: an advisory lock of the flow until commit, so that workers that start together make
-- it once; then those of what it calls. Failure: the caller's, whole.
create or replace function pgflow.ensure_flow_compiled(flow_slug text, shape jsonb, allow_data_loss boolean default false)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_status      text;
    v_differences text[] := '{}';
begin
    perform pg_advisory_xact_lock(1, hashtext(ensure_flow_compiled.flow_slug));

    if not exists (select from pgflow.flows as f where f.flow_slug = ensure_flow_compiled.flow_slug) then
        perform pgflow._create_flow_from_shape(ensure_flow_compiled.flow_slug, ensure_flow_compiled.shape);
        v_status := 'compiled';
    else
        v_differences := pgflow._compare_flow_shapes(
            ensure_flow_compiled.shape, pgflow._get_flow_shape(ensure_flow_compiled.flow_slug));
        if cardinality(v_differences) = 0 then
            v_status := 'verified';
        elsif coalesce(ensure_flow_compiled.allow_data_loss, false) or pgflow.is_local() then
            perform pgflow.delete_flow_and_data(ensure_flow_compiled.flow_slug);
            perform pgflow._create_flow_from_shape(ensure_flow_compiled.flow_slug, ensure_flow_compiled.shape);
            v_status := 'recompiled';
        else
            v_status := 'mismatch';
        end if;
    end if;

    return jsonb_build_object('status', v_status, 'differences', to_jsonb(v_differences));
end;
$$;
