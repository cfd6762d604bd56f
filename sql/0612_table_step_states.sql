-- A step keeps its own output, and may be skipped.
-- Written by: whoever ends a step; skipping, `_cascade_force_skip_steps`, `cascade_resolve_conditions` and `fail_task`.
-- Locks: see the table's own file. Failure: aborts the install.
-- INVARIANT: as before, no index but the primary key.
--
-- An upgrade fills in the outputs of steps that completed before it, once, from those of their tasks: runs in flight go on
-- as if they had been started under 0.14.
do $$
begin
    if not exists (
        select from pg_catalog.pg_attribute as a
        where a.attrelid = 'pgflow.step_states'::regclass and a.attname = 'output' and not a.attisdropped
    ) then
        alter table pgflow.step_states add column output jsonb;
        update pgflow.step_states as s
        set output = done.output
        from (
            select
                s.run_id, s.step_slug,
                case when d.step_type = 'map' then
                    coalesce(jsonb_agg(t.output order by t.task_index) filter (where t.run_id is not null), '[]'::jsonb)
                else
                    (array_agg(t.output order by t.task_index))[1]
                end as output
            from pgflow.step_states as s
            join pgflow.steps as d on d.flow_slug = s.flow_slug and d.step_slug = s.step_slug
            left join pgflow.step_tasks as t
              on t.run_id = s.run_id and t.step_slug = s.step_slug and t.status = 'completed'
            where s.status = 'completed'
            group by s.run_id, s.step_slug, d.step_type
        ) as done
        where s.run_id = done.run_id and s.step_slug = done.step_slug and done.output is not null;
    end if;
end;
$$;

alter table pgflow.step_states
    add column if not exists skip_reason text,
    add column if not exists skipped_at  timestamptz;

do $$
begin
    if (
        select count(*) from pg_catalog.pg_constraint as c
        where c.conrelid = 'pgflow.step_states'::regclass
          and (c.conname in (
                   'output_only_for_completed_or_null', 'skip_reason_matches_status',
                   'completed_at_or_failed_at_or_skipped_at', 'skipped_at_is_after_created_at')
               or c.conname in ('status_is_valid', 'remaining_tasks_state_consistency')
                  and pg_get_constraintdef(c.oid) like '%skipped%')
    ) < 6 then
        alter table pgflow.step_states
            drop constraint if exists status_is_valid,
            drop constraint if exists remaining_tasks_state_consistency,
            drop constraint if exists completed_at_or_failed_at,
            drop constraint if exists output_only_for_completed_or_null,
            drop constraint if exists skip_reason_matches_status,
            drop constraint if exists completed_at_or_failed_at_or_skipped_at,
            drop constraint if exists skipped_at_is_after_created_at,
            add constraint status_is_valid check (status in ('created', 'started', 'completed', 'failed', 'skipped')),
            add constraint remaining_tasks_state_consistency
                check (status not in ('created', 'skipped') or remaining_tasks is null),
            add constraint output_only_for_completed_or_null check (output is null or status = 'completed'),
            add constraint skip_reason_matches_status check ((status = 'skipped') = (skip_reason is not null)),
            add constraint completed_at_or_failed_at_or_skipped_at
                check (num_nonnulls(completed_at, failed_at, skipped_at) <= 1),
            add constraint skipped_at_is_after_created_at check (skipped_at >= created_at);
    end if;
end;
$$;
