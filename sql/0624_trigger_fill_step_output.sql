-- For calls of 0.7 only: what is 0.14 says a step's output itself, or means it to be null. After the row is changed and not before,
-- since a trigger that comes before costs every update a lock of the row; this one costs a comparison.
-- Called by: updates of pgflow.step_states that complete a step without output. Locks, failure: those of its function.
do $$
begin
    if not exists (
        select from pg_catalog.pg_trigger as t
        where t.tgrelid = 'pgflow.step_states'::regclass and t.tgname = 'fill_step_output'
    ) then
        create trigger fill_step_output
            after update on pgflow.step_states
            for each row
            when (new.status = 'completed' and old.status <> 'completed' and new.output is null)
            execute function pgflow._fill_step_output();
    end if;
end;
$$;
