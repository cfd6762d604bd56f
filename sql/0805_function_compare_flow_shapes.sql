-- What tells two shapes apart, step by step, in words; an empty array if nothing does. Options don't count; what a shape leaves
-- out is the default, and dependencies are a set.
-- Called by: `ensure_flow_compiled`. Locks: none. Failure: a shape whose steps are no array is 22023.
create or replace function pgflow._compare_flow_shapes(p_local jsonb, p_db jsonb)
returns text[]
language plpgsql
stable
set search_path = ''
as $$
declare
    v_local jsonb := coalesce(p_local -> 'steps', '[]');
    v_db    jsonb := coalesce(p_db -> 'steps', '[]');
    v_sizes text[] := '{}';
begin
    if jsonb_array_length(v_local) <> jsonb_array_length(v_db) then
        v_sizes := array[
            format('Step count differs: %s vs %s', jsonb_array_length(v_local), jsonb_array_length(v_db))];
    end if;

    return v_sizes || array(
        with step as (
            select side, place - 1 as index, given ->> 'slug' as slug, said.*
            from (
                select 1 as side, l.* from jsonb_array_elements(v_local) with ordinality as l(given, place)
                union all
                select 2, d.* from jsonb_array_elements(v_db) with ordinality as d(given, place)
            ) as steps
            cross join lateral (values
                (1, 'slug', format('''%s''', given ->> 'slug')),
                (2, 'type', format('''%s''', coalesce(given ->> 'stepType', 'single'))),
                (3, 'dependencies', '[' || array_to_string(
                    array(
                        select named.slug
                        from jsonb_array_elements_text(coalesce(given -> 'dependencies', '[]')) as named(slug)
                        order by named.slug collate "C"),
                    ', ') || ']'),
                (4, 'whenUnmet', format('''%s''', coalesce(given ->> 'whenUnmet', 'skip'))),
                (5, 'whenExhausted', format('''%s''', coalesce(given ->> 'whenExhausted', 'fail'))),
                (6, 'requiredInputPattern',
                    format('''%s''', coalesce(given -> 'requiredInputPattern', '{"defined": false}'))),
                (7, 'forbiddenInputPattern',
                    format('''%s''', coalesce(given -> 'forbiddenInputPattern', '{"defined": false}')))
            ) as said(field, name, value)
        )
        select
            case
                when l.index is null then
                    format('Step at index %s: missing in first shape (second has ''%s'')', d.index, d.slug)
                when d.index is null then
                    format('Step at index %s: missing in second shape (first has ''%s'')', l.index, l.slug)
                else
                    format(
                        'Step at index %s: %s %s %s vs %s', l.index, l.name,
                        case l.name when 'dependencies' then 'differ' else 'differs' end, l.value, d.value)
            end
        from (select * from step where side = 1) as l
        full join (select * from step where side = 2) as d on d.index = l.index and d.field = l.field
        -- A step that only one has is said once.
        where (l.index is null and d.field = 1) or (d.index is null and l.field = 1) or l.value <> d.value
        order by coalesce(l.index, d.index), coalesce(l.field, d.field));
end;
$$;
