-- Conditions of a step: what its input must and must not contain, and what happens when it doesn't fit (`when_unmet`) or when
-- its handler has failed for good (`when_exhausted`).
-- Written by: `add_step`. Read by: `cascade_resolve_conditions`, `fail_task`. Locks: see the table's own file.
alter table pgflow.steps
    add column if not exists required_input_pattern  jsonb,
    add column if not exists forbidden_input_pattern jsonb,
    add column if not exists when_unmet              text not null default 'skip',
    add column if not exists when_exhausted          text not null default 'fail';

do $$
begin
    if (
        select count(*) from pg_catalog.pg_constraint as c
        where c.conrelid = 'pgflow.steps'::regclass
          and c.conname in (
              'required_input_pattern_is_object', 'forbidden_input_pattern_is_object', 'when_unmet_is_valid',
              'when_exhausted_is_valid')
    ) < 4 then
        alter table pgflow.steps
            drop constraint if exists required_input_pattern_is_object,
            drop constraint if exists forbidden_input_pattern_is_object,
            drop constraint if exists when_unmet_is_valid,
            drop constraint if exists when_exhausted_is_valid,
            add constraint required_input_pattern_is_object
                check (required_input_pattern is null or jsonb_typeof(required_input_pattern) = 'object'),
            add constraint forbidden_input_pattern_is_object
                check (forbidden_input_pattern is null or jsonb_typeof(forbidden_input_pattern) = 'object'),
            add constraint when_unmet_is_valid check (when_unmet in ('fail', 'skip', 'skip-cascade')),
            add constraint when_exhausted_is_valid check (when_exhausted in ('fail', 'skip', 'skip-cascade'));
    end if;
end;
$$;
