-- Makes a flow and its steps as a shape says, options included.
-- Called by: `ensure_flow_compiled`. Locks and failure: those of `create_flow` and `add_step`.
create or replace function pgflow._create_flow_from_shape(p_flow_slug text, p_shape jsonb)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_flow jsonb := coalesce(p_shape -> 'options', '{}');
    v_step jsonb;
begin
    perform pgflow.create_flow(
        p_flow_slug, (v_flow ->> 'maxAttempts')::integer, (v_flow ->> 'baseDelay')::integer,
        (v_flow ->> 'timeout')::integer);

    for v_step in
        select given.step
        from jsonb_array_elements(coalesce(p_shape -> 'steps', '[]')) with ordinality as given(step, place)
        order by given.place
    loop
        perform pgflow.add_step(
            flow_slug => p_flow_slug,
            step_slug => v_step ->> 'slug',
            deps_slugs => array(
                select named.slug
                from jsonb_array_elements_text(coalesce(v_step -> 'dependencies', '[]')) with ordinality
                    as named(slug, place)
                order by named.place),
            max_attempts => (v_step -> 'options' ->> 'maxAttempts')::integer,
            base_delay => (v_step -> 'options' ->> 'baseDelay')::integer,
            timeout => (v_step -> 'options' ->> 'timeout')::integer,
            start_delay => (v_step -> 'options' ->> 'startDelay')::integer,
            step_type => v_step ->> 'stepType',
            required_input_pattern => case
                when (v_step -> 'requiredInputPattern' ->> 'defined')::boolean then
                    v_step -> 'requiredInputPattern' -> 'value'
            end,
            forbidden_input_pattern => case
                when (v_step -> 'forbiddenInputPattern' ->> 'defined')::boolean then
                    v_step -> 'forbiddenInputPattern' -> 'value'
            end,
            when_unmet => v_step ->> 'whenUnmet',
            when_exhausted => v_step ->> 'whenExhausted');
    end loop;
end;
$$;
