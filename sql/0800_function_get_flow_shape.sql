-- The shape of a flow as it is defined here: its steps in order, what they depend on and their conditions; no options.
-- Called by: `ensure_flow_compiled`; whoever wants to know. Locks: none. Failure: none; an unknown flow has no steps.
create or replace function pgflow._get_flow_shape(p_flow_slug text)
returns jsonb
language plpgsql
stable
set search_path = ''
as $$
begin
    return jsonb_build_object(
        'steps',
        coalesce(
            (select jsonb_agg(
                jsonb_build_object(
                    'slug', s.step_slug,
                    'stepType', s.step_type,
                    'dependencies', coalesce(
                        (select jsonb_agg(e.dep_slug order by e.dep_slug collate "C")
                         from pgflow.deps as e
                         where e.flow_slug = s.flow_slug and e.step_slug = s.step_slug),
                        '[]'::jsonb),
                    'whenUnmet', s.when_unmet,
                    'whenExhausted', s.when_exhausted,
                    'requiredInputPattern', case
                        when s.required_input_pattern is null then jsonb_build_object('defined', false)
                        else jsonb_build_object('defined', true, 'value', s.required_input_pattern)
                    end,
                    'forbiddenInputPattern', case
                        when s.forbidden_input_pattern is null then jsonb_build_object('defined', false)
                        else jsonb_build_object('defined', true, 'value', s.forbidden_input_pattern)
                    end)
                order by s.step_index)
             from pgflow.steps as s
             where s.flow_slug = p_flow_slug),
            '[]'::jsonb));
end;
$$;
