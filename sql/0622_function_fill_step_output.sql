-- Trigger: gives a step that completed without saying its output the output of its tasks.
-- Called by: trigger fill_step_output on pgflow.step_states. Locks: the step, which its caller holds. Failure: its statement's.
--
-- Calls of 0.7 that were under way when an upgrade came go on with 0.7's code in 0.14's tables: a function that has begun is not
-- replaced. Each worker may have one such call waiting for the installer, and many of them end a step.
create or replace function pgflow._fill_step_output()
returns trigger
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_output jsonb;
begin
    select
        case
            when d.step_type = 'map' then
                coalesce(jsonb_agg(t.output order by t.task_index) filter (where t.run_id is not null), '[]'::jsonb)
            else (array_agg(t.output))[1]
        end
    into v_output
    from pgflow.steps as d
    left join pgflow.step_tasks as t
      on t.run_id = new.run_id and t.step_slug = new.step_slug and t.status = 'completed'
    where d.flow_slug = new.flow_slug and d.step_slug = new.step_slug
    group by d.step_type;

    if v_output is not null then
        update pgflow.step_states as s
        set output = v_output
        where s.run_id = new.run_id and s.step_slug = new.step_slug;
    end if;
    return null;
end;
$$;
