-- Seconds to wait before the next try: the base, doubled for each try made so far.
-- Called by: `fail_task`, which clamps before it asks: beyond an integer this raises 22003. Locks: none.
create or replace function pgflow.calculate_retry_delay(base_delay numeric, attempts_count integer)
returns integer
language plpgsql
immutable
parallel safe
set search_path = ''
as $$
begin
    return floor(
        calculate_retry_delay.base_delay * power(2::numeric, calculate_retry_delay.attempts_count::numeric))::integer;
end;
$$;
