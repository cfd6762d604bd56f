-- Adds a step to a flow; an existing step is returned as it is, whatever is given.
-- Called by: whoever defines flows; compiled pgflow migrations; `_create_flow_from_shape`. Locks: the flow's row until commit, so
-- that concurrent calls number their steps one after the other. Failure: the caller's; unknown flow and unknown dependency are
-- foreign keys, a step that depends on itself is deps_check.
--
-- The eight arguments of 0.7 would make a call with eight ambiguous.
drop function if exists pgflow.add_step(text, text, text[], integer, integer, integer, integer, text);

create or replace function pgflow.add_step(
    flow_slug               text,
    step_slug               text,
    deps_slugs              text[] default '{}',
    max_attempts            integer default null,
    base_delay              integer default null,
    timeout                 integer default null,
    start_delay             integer default null,
    step_type               text default 'single',
    required_input_pattern  jsonb default null,
    forbidden_input_pattern jsonb default null,
    when_unmet              text default 'skip',
    when_exhausted          text default 'fail'
)
returns pgflow.steps
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_step pgflow.steps;
    v_deps text[];
begin
    -- A dependency named twice is one edge, so it must count once.
    select coalesce(array_agg(named.slug order by named.place), '{}')
    into v_deps
    from (
        select given.slug, min(given.place) as place
        from unnest(add_step.deps_slugs) with ordinality as given(slug, place)
        group by given.slug
    ) as named;

    if add_step.step_type = 'map' and cardinality(v_deps) > 1 then
        raise exception 'Map step "%" can have at most one dependency, but % were provided: %',
            add_step.step_slug, cardinality(v_deps), array_to_string(v_deps, ', ');
    end if;

    perform from pgflow.flows as f where f.flow_slug = add_step.flow_slug for no key update;

    select s.* into v_step
    from pgflow.steps as s
    where s.flow_slug = add_step.flow_slug and s.step_slug = add_step.step_slug;
    if found then
        return v_step;
    end if;

    insert into pgflow.steps (
        flow_slug, step_slug, step_type, step_index, deps_count,
        opt_max_attempts, opt_base_delay, opt_timeout, opt_start_delay,
        required_input_pattern, forbidden_input_pattern, when_unmet, when_exhausted
    )
    select
        add_step.flow_slug, add_step.step_slug, coalesce(add_step.step_type, 'single'),
        coalesce(max(s.step_index) + 1, 0), cardinality(v_deps),
        add_step.max_attempts, add_step.base_delay, add_step.timeout, add_step.start_delay,
        add_step.required_input_pattern, add_step.forbidden_input_pattern,
        coalesce(add_step.when_unmet, 'skip'), coalesce(add_step.when_exhausted, 'fail')
    from pgflow.steps as s
    where s.flow_slug = add_step.flow_slug
    returning * into v_step;

    insert into pgflow.deps (flow_slug, dep_slug, step_slug)
    select add_step.flow_slug, named.slug, add_step.step_slug from unnest(v_deps) as named(slug);

    return v_step;
end;
$$;
