//! No write is ever taken for a read, however it is spelled: statements made from a grammar, held against the classifier
//! and against a replica, which is the judge of what writes. `FLOWGATE_CORPUS` says how many, `FLOWGATE_SEED` which.

use std::collections::BTreeMap;

use flowgate::classify::Judge;
use flowgate::config::Reads;
use futures_util::future::join_all;
use tokio::time::timeout;
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::events::define_flow;
use crate::support::chance::{Chance, seed};
use crate::support::pg::{fresh_database, replica_catches_up};
use crate::support::proxy::{PATIENCE, Proxy, table, text};

const STATEMENTS: usize = 5_000;
/// Of the reads, so many are sent through a proxy.
const CARRIED: usize = 300;
/// Sent to a server without waiting for the answers in between.
const AT_ONCE: usize = 64;
const RUN: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

/// What the statements find: a user's tables and functions beside pgflow's own. `liar` writes whatever it says.
const SURROUNDINGS: &str = "
    create table public.notes (id int primary key, body text, payload jsonb);
    insert into public.notes select n, 'body ' || n, jsonb_build_object('n', n) from generate_series(1, 5) n;
    create table public.\"Odd Name\" (\"Id\" int, \"select\" text);
    create table public.log (n int);
    create sequence public.seq;
    create type public.mood as enum ('a', 'b');
    create function public.liar() returns int language plpgsql stable as $$ begin execute 'insert into public.log values (1)'; return 1; end $$;
    create function public.pair(out a int, out b int) language plpgsql as $$ begin insert into public.log values (1); a := 1; b := 2; end $$;
    create function public.lower(int) returns text language sql as $$ insert into public.log values (1) returning 'x' $$;
    create procedure public.act() language sql as $$ insert into public.log values (1) $$";

/// Words are separated by blanks. `{x}` is made by a rule of that name, `@x` a name that may be quoted; the first rules of
/// a name end the depth.
fn rules(name: &str) -> (&'static [&'static str], usize) {
    match name {
        "int" => (
            &[
                "1",
                "42",
                "0",
                "- 7",
                "{int} + {int}",
                "{int} * {int}",
                "( {int} )",
                "{int} :: int",
                "cast ( {int} as integer )",
                "@abs ( {int} )",
                "@pg_catalog . @abs ( {int} )",
                "@length ( {text} )",
                "{int} % 5",
                "{int} / {int}",
                "coalesce ( null , {int} )",
                "greatest ( {int} , {int} )",
                "nullif ( {int} , {int} )",
                "case when {bool} then {int} else {int} end",
                "case {int} when 1 then {int} end",
                "( select {int} )",
                "( select @count ( * ) from {table} ) :: int",
                "( select @max ( @n ) from @generate_series ( 1 , 3 ) as @n )",
                "extract ( epoch from now ( ) ) :: int",
                "( array [ {int} , {int} ] ) [ 1 ]",
                "@cardinality ( array [ {int} ] )",
                "( {json} ->> 'n' ) :: int",
                "@jsonb_array_length ( '[1,2]' :: jsonb )",
                "position ( 'a' in {text} )",
                "@round ( {int} :: numeric , 2 ) :: int",
                "( with @c as ( select {int} as @v ) select @c . @v from @c )",
            ],
            4,
        ),
        "text" => (
            &[
                "'a'",
                "$q$ select pgflow.start_flow() $q$",
                "'it''s; delete'",
                "$$update$$",
                "''",
                "{text} || {text}",
                "@lower ( {text} )",
                "@upper ( {text} )",
                "@replace ( {text} , 'a' , {text} )",
                "substring ( {text} from 1 )",
                "@substr ( {text} , {int} )",
                "trim ( {text} )",
                "@md5 ( {text} )",
                "{int} :: text",
                "cast ( {int} as text )",
                "@to_char ( now ( ) , 'YYYY' )",
                "@concat ( {text} , {int} )",
                "case when {bool} then {text} else {text} end",
                "( {text} )",
                "( select {text} )",
                "{json} ->> {text}",
                "( {json} -> 'run' ) ->> 'status'",
                "{uuid} :: text",
                "@format ( '%s' , {text} )",
                "( select @string_agg ( @f . @flow_slug , ',' order by @f . @flow_slug ) from @pgflow . @flows @f )",
                "@split_part ( {text} , ',' , 1 )",
                "@left ( {text} , {int} )",
                "{text} collate \"C\"",
            ],
            5,
        ),
        "bool" => (
            &[
                "true",
                "false",
                "{int} = {int}",
                "{text} like {text}",
                "{int} between {int} and {int}",
                "not {bool}",
                "{bool} and {bool}",
                "( {bool} or {bool} )",
                "{int} in ( {int} , {int} )",
                "{text} is not null",
                "exists ( select 1 from {table} )",
                "{int} = any ( array [ {int} , {int} ] )",
                "{json} @> {json}",
                "{text} ~* 'x'",
                "{text} is distinct from {text}",
                "{int} in ( select {int} )",
                "{json} ? 'n'",
                "( {int} , {text} ) = ( {int} , {text} )",
                "{text} ilike {text}",
            ],
            2,
        ),
        "json" => (
            &[
                "'{{\"n\":1}}' :: jsonb",
                "jsonb '{{}}'",
                "@to_jsonb ( {int} )",
                "@jsonb_build_object ( 'n' , {int} )",
                "@pgflow . @get_run_with_states ( {uuid} )",
                "@pgflow . @get_run_with_states ( @run_id => {uuid} )",
                "{json} -> 'run'",
                "{json} #> '{{run,status}}'",
                "@pgflow . @get_flow_shape ( {slug} )",
                "( {json} )",
                "@jsonb_set ( {json} , '{{n}}' , '2' )",
                "( select {json} )",
                "@jsonb_strip_nulls ( {json} )",
                "( select @jsonb_agg ( @r . @status ) from @pgflow . @runs @r )",
            ],
            4,
        ),
        "uuid" => (
            &[
                "'67e55044-10b1-426f-9247-bb680e5fe0c8'",
                "'67e55044-10b1-426f-9247-bb680e5fe0c8' :: uuid",
                "uuid '67e55044-10b1-426f-9247-bb680e5fe0c8'",
                "cast ( '67e55044-10b1-426f-9247-bb680e5fe0c8' as uuid )",
                "( select @z . @run_id from @pgflow . @runs as @z limit 1 )",
            ],
            4,
        ),
        "slug" => (&["'greet'", "'greet' :: text", "'none'"], 3),
        "table" => (
            &[
                "@pgflow . @runs",
                "@pgflow . @flows",
                "@pgflow . @step_states",
                "@pgflow . @step_tasks",
                "@pgflow . @steps",
                "@public . @notes",
                "@notes",
                "\"Odd Name\"",
                "@pgflow . @deps",
                "@pgflow . @workers",
            ],
            10,
        ),
        "rtext" => (
            &[
                "@r . @status",
                "@r . @flow_slug",
                "@status",
                "@r . @run_id :: text",
                "{text}",
                "@r . @input ->> 'n'",
            ],
            4,
        ),
        "rint" => (
            &[
                "@r . @remaining_steps",
                "@remaining_steps",
                "{int}",
                "@length ( @r . @status )",
                "@row_number ( ) over ( partition by @r . @flow_slug order by @r . @started_at desc ) :: int",
            ],
            2,
        ),
        "rbool" => (
            &[
                "@r . @status = 'started'",
                "@r . @run_id = {uuid}",
                "{bool}",
                "@r . @status in ( {text} , {text} )",
                "exists ( select 1 from @pgflow . @step_states @s where @s . @run_id = @r . @run_id )",
                "{rbool} and {rbool}",
                "@r . @remaining_steps > {int}",
                "@r . @input is null",
                "@r . @started_at < now ( ) - interval '1 day'",
            ],
            3,
        ),
        "items" => (
            &[
                "{rtext}",
                "{rint}",
                "@r . *",
                "*",
                "{rtext} , {rint}",
                "{rtext} as @x",
                "{items} , {items}",
                "@r . @output -> 'a'",
                "distinct {rtext}",
            ],
            6,
        ),
        "tail" => (
            &[
                "",
                "where {rbool}",
                "where {rbool} limit {int}",
                "order by 1",
                "where {rbool} order by 1 desc nulls last limit 10 offset 1",
                "limit 3",
                "fetch first 2 rows only",
                "where {rbool} order by @r . @started_at limit ( select {int} )",
            ],
            8,
        ),
        "runs" => (
            &[
                "@pgflow . @runs @r",
                "@pgflow . @runs as @r",
                "only @pgflow . @runs as @r",
                "@pgflow . @runs @r left join @pgflow . @flows @f on @f . @flow_slug = @r . @flow_slug and {bool}",
                "@pgflow . @runs @r cross join lateral ( select {int} as @v ) as @l",
                "( select * from @pgflow . @runs ) as @r",
                "@pgflow . @runs @r , lateral @jsonb_each ( @r . @input ) as @e",
                "@pgflow . @runs @r cross join @generate_series ( 1 , {int} % 3 ) as @g",
                "@pgflow . @runs @r left join lateral ( select @s . @step_slug from @pgflow . @step_states @s where @s . @run_id = @r . @run_id ) as @l on {bool}",
            ],
            2,
        ),
        // One column of text.
        "query1" => (
            &[
                "select {text}",
                "select {rtext} from {runs} {tail}",
                "select @n . @body from @notes as @n where @n . @id = {int}",
                "select @f . @flow_slug from @pgflow . @flows as @f",
                "select \"select\" from \"Odd Name\"",
            ],
            1,
        ),
        "query" => (
            &[
                "{query1}",
                "select {items} from {runs} {tail}",
                "select {items} from {runs} {tail}",
                "select @count ( * ) filter ( where {rbool} ) , @max ( @r . @started_at ) from {runs} group by @r . @flow_slug having {bool}",
                "select @n . * from @public . @notes @n where {bool} order by @n . @id",
                "table {table}",
                "values ( {int} , {text} ) , ( {int} , {text} )",
                "select * from {table} limit 2",
                "{query1} union all {query1}",
                "{query1} except {query1} order by 1",
                "( {query1} ) intersect ( {query1} )",
                "select {json} , {int}",
                "select * from @pgflow . @get_run_with_states ( {uuid} ) as @doc",
                "select @j . @key from @jsonb_each ( {json} ) as @j",
                "select * from @pgmq . @metrics ( 'greet' )",
                "select @q . @queue_name from @pgmq . @list_queues ( ) as @q",
                "select @x . @v from ( select {int} as @v ) @x",
                "with @w as ( {query1} ) select * from @w",
                "with @w ( @a ) as not materialized ( {query1} ) select @w . @a from @w",
                "with recursive @t ( @n ) as ( values ( 1 ) union all select @t . @n + 1 from @t where @t . @n < 5 ) select @sum ( @n ) , {int} from @t",
                "with @w as ( select {items} from {runs} {tail} ) , @v as ( select 1 as @one ) select * from @w , @v",
                "( {query} )",
                "select @d . @doc -> 'run' from ( select {json} as @doc ) as @d",
                "select exists ( {query1} )",
                "select @s . @step_slug , @r . @status from @pgflow . @step_states @s join @pgflow . @runs @r using ( @run_id ) where {rbool}",
                "select @rank ( ) over @win from @pgflow . @runs @r window @win as ( order by @r . @started_at )",
            ],
            2,
        ),
        // Writes, or what is nobody's but the primary's, in the place of a number.
        "int!" => (
            &[
                "@nextval ( 'public.seq' ) :: int",
                "@pg_catalog . @nextval ( 'public.seq' ) :: int",
                "@setval ( 'public.seq' , 5 ) :: int",
                "@lastval ( ) :: int",
                "@currval ( 'public.seq' ) :: int",
                "@liar ( )",
                "@public . @liar ( )",
                "\"public\" . \"liar\" ( )",
                "U&\"\\006ciar\" ( )",
                "( select @liar ( ) )",
                "( @public . @pair ( ) ) . @a",
                "( select @p . @a from @public . @pair ( ) as @p )",
                "@lo_creat ( - 1 ) :: int",
                "@length ( @set_config ( 'a.b' , 'c' , false ) )",
                "@length ( @pg_notify ( 'a' , 'b' ) :: text )",
                "@txid_current ( ) :: int",
                "@pg_current_xact_id ( ) :: text :: int",
                "@length ( @pg_advisory_lock ( 1 ) :: text )",
                "@pg_try_advisory_xact_lock ( 1 ) :: int",
                "@length ( @pg_sleep ( 0 ) :: text )",
                "@length ( @lower ( 1 ) :: public . @mood :: text )",
                "@public . @length ( 'a' )",
                "( select @f . @remaining_steps from @pgflow . @start_flow ( 'greet' , '{{}}' ) as @f )",
                "( @pgflow . @start_flow ( 'greet' , '{{}}' ) ) . @remaining_steps",
                "( select @count ( * ) from @pgflow . @start_flow ( 'greet' , '{{}}' ) ) :: int",
                "( select @count ( * ) from @pgflow . @start_flow ( @flow_slug => 'greet' , @input := '{{}}' ) ) :: int",
                "( select @s . @send from @pgmq . @send ( 'greet' , '{{}}' ) as @s ) :: int",
                "@pgmq . @send ( 'greet' , '{{}}' ) :: int",
                "( select @count ( * ) from @pgmq . @read ( 'greet' , 1 , 1 ) ) :: int",
                "( select @count ( * ) from @pgmq . @pop ( 'greet' ) ) :: int",
                "( select @count ( * ) from @pgflow . @complete_task ( {uuid} , 'hello' , 0 , '1' ) ) :: int",
                "( select @count ( * ) from @pgflow . @fail_task ( {uuid} , 'hello' , 0 , 'x' ) ) :: int",
                "( select @count ( * ) from @pgflow . @start_tasks ( 'greet' , array [ 1 ] :: bigint [ ] , {uuid} ) ) :: int",
                "@pgflow . @prune_data_older_than ( interval '1 day' ) :: text :: int",
                "( select @count ( * ) from @dblink ( 'x' , 'y' ) ) :: int",
                "@pg_stat_reset ( ) :: text :: int",
                "@pg_logical_emit_message ( true , 'a' , 'b' ) :: text :: int",
                "@pg_backup_start ( 'x' ) :: text :: int",
                "@pg_terminate_backend ( 0 ) :: int",
                "@pg_reload_conf ( ) :: int",
                "@query_to_xml ( 'select liar()' , true , true , '' ) :: text :: int",
                "@pg_read_file ( 'x' ) :: int",
                "@concat ( variadic array [ @liar ( ) :: text ] ) :: int",
                "1 operator ( @public . + ) 1",
                "( 1 ~@~ 1 ) :: int",
                "@pg_export_snapshot ( ) :: int",
                "@pg_create_restore_point ( 'x' ) :: text :: int",
            ],
            48,
        ),
        "text!" => (
            &[
                "'a' :: @public . @mood :: text",
                "cast ( 'a' as @mood ) :: text",
                "@mood 'a' :: text",
                "@public . @mood 'a' :: text",
                "@public . @lower ( 1 )",
                "@pgflow . @mine ( )",
                "@pgflow . @Get_Run ( )",
                "{int!} :: text",
                "@setseed ( 0.5 ) :: text",
                "@pg_switch_wal ( ) :: text",
            ],
            10,
        ),
        // Whole statements that are nobody's but the primary's.
        "query!" => (
            &[
                "with @w as ( insert into @public . @log values ( 1 ) returning @n ) {query}",
                "with @w as ( insert into @log values ( 1 ) ) select {int}",
                "with @w as ( update @public . @log set @n = 2 returning @n ) select * from @w",
                "with @w as ( delete from @log returning * ) select {items} from {runs}",
                "with @w as ( {query1} ) insert into @log select 1 from @w",
                "with @w as ( {query1} ) delete from @log",
                "with @w as ( {query1} ) update @log set @n = 1",
                "with @w as materialized ( with @v as ( delete from @log returning @n ) select * from @v ) select * from @w",
                "select * from @pgflow . @runs @r for update",
                "select {rtext} from @pgflow . @runs @r where {rbool} for no key update skip locked",
                "select * from {table} for share",
                "select * from @pgflow . @runs @r for key share of @r nowait",
                "select * from ( select * from @pgflow . @runs for update ) as @x",
                "{query1} for update",
                "select {rtext} into @fresh1 from {runs}",
                "select 1 as @a into temp @fresh2",
                "select {rtext} as @a into table @public . @fresh3 from {runs} {tail}",
                "select {int} as @a into unlogged @fresh4",
                "explain analyze {query}",
                "explain ( analyze ) select @liar ( )",
                "create table @fresh5 as {query}",
                "create temp table @fresh6 as {query1}",
                "create materialized view @fresh7 as {query1}",
                "prepare @p as {query}",
                "execute @p",
                "declare @c cursor with hold for {query}",
                "copy ( {query} ) to stdout",
                "copy @log from stdin",
                "insert into @log select {int}",
                "{query} ; delete from @log",
                "delete from @log ; {query}",
                "begin ; {query} ; commit",
                "set @search_path = @pgflow , @public ; select * from @start_flow ( 'greet' , '{{}}' )",
                "{query} ; {query}",
                "select * from rows from ( @public . @liar ( ) , @generate_series ( 1 , 2 ) ) as @x",
                "select ( @public . @pair ( ) ) . *",
                "select ( @pgflow . @start_flow ( 'greet' , '{{}}' ) ) . *",
                "call @public . @act ( )",
                "do $$ begin perform public.liar(); end $$",
                "merge into @log using @notes on true when matched then delete",
                "lock table @log",
                "truncate @log",
                "select @r . @liar from @pgflow . @runs @r",
                "select @runs . @liar from @pgflow . @runs",
                "select ( @r ) . @liar from @pgflow . @runs @r",
                "select * from @pgflow . @my_view",
                "listen @a",
                "notify @a",
                "select * from @pgflow . @runs tablesample @my_method ( 1 )",
                "table @pgflow . @my_view",
                "discard all",
                "vacuum @log",
                "select * from @public . @liar ( ) as @l",
                "refresh materialized view @fresh7",
                "select @lower ( {text} ) from {runs} where @r . @status = E'\\' ; delete from log --'",
                "select * from @pgflow . @start_flow ( 'greet' , '{{}}' )",
                "select * from @pgflow.@runs where @status = 'open",
                "insert into @notes values ( 100 , {text} , {json} ) on conflict do nothing returning *",
                "values ( ( select @run_id from @pgflow . @start_flow ( 'greet' , '{{}}' ) ) )",
                "select @r . * from {runs} order by @liar ( )",
                "select 1 limit @liar ( )",
                "select 1 offset ( select @liar ( ) )",
                "select distinct on ( @liar ( ) ) 1",
                "select 1 group by @liar ( )",
                "select @count ( * ) from {runs} having @liar ( ) > 0",
                "select @sum ( @liar ( ) ) over ( ) from {runs}",
                "select @count ( * ) filter ( where @liar ( ) > 0 ) from {runs}",
                "select 1 from {runs} join @flows on @liar ( ) > 0",
                "select 1 from {runs} window @w as ( order by @liar ( ) )",
            ],
            usize::MAX,
        ),
        other => panic!("no rule {other}"),
    }
}

struct Maker {
    chance: Chance,
    /// Numbers and texts until one of them writes.
    until_write: Option<u64>,
    writes: bool,
}

impl Maker {
    /// A statement, and whether it is nobody's but the primary's.
    fn statement(&mut self) -> (String, bool) {
        self.writes = false;
        self.until_write = self.chance.one_in(3).then(|| self.chance.below(8));
        let mut words = Vec::new();
        if self.chance.one_in(5) {
            self.writes = true;
            self.expand("query!", 5, &mut words);
        } else {
            self.expand("query", 5, &mut words);
        }
        let mut statement = String::new();
        for word in &words {
            self.between(&mut statement);
            self.spell(word, &mut statement);
        }
        if self.chance.one_in(6) {
            statement += " ;";
        }
        self.between(&mut statement);
        (statement, self.writes)
    }

    fn expand(&mut self, name: &str, depth: usize, out: &mut Vec<String>) {
        let mut name = name.to_owned();
        if matches!(name.as_str(), "int" | "text")
            && let Some(left) = &mut self.until_write
        {
            if *left == 0 {
                self.until_write = None;
                self.writes = true;
                name += "!";
            } else {
                *left -= 1;
            }
        }
        let (rules, plain) = rules(&name);
        let open = if depth == 0 {
            plain.min(rules.len())
        } else {
            rules.len()
        };
        let rule = *self.chance.pick(&rules[..open]);
        for word in rule.split_whitespace() {
            match word
                .strip_prefix('{')
                .and_then(|word| word.strip_suffix('}'))
            {
                Some(name) if !name.starts_with('{') => {
                    self.expand(name, depth.saturating_sub(1), out);
                }
                _ => out.push(word.replace("{{", "{").replace("}}", "}")),
            }
        }
    }

    fn between(&mut self, out: &mut String) {
        let between: &&str = self.chance.pick(&[
            " ",
            " ",
            " ",
            " ",
            " ",
            "  ",
            "\n",
            "\t",
            "/**/",
            " /* pgflow.start_flow('a') */ ",
            " -- for update\n",
            " /* a /* nested */ ; */ ",
            "\r\n",
        ]);
        *out += between;
    }

    fn spell(&mut self, word: &str, out: &mut String) {
        let (name, word) = match word.strip_prefix('@') {
            Some(name) => (true, name),
            None => (false, word),
        };
        let plain = word
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if name && self.chance.one_in(6) {
            *out += &format!("\"{word}\"");
        } else if plain && self.chance.one_in(3) {
            *out += &word.to_uppercase();
        } else if plain && self.chance.one_in(8) {
            let (head, rest) = word.split_at(1);
            *out += &(head.to_uppercase() + rest);
        } else {
            *out += word;
        }
    }
}

fn corpus_size() -> usize {
    let given = std::env::var("FLOWGATE_CORPUS").ok();
    given.map_or(STATEMENTS, |given| given.parse().unwrap())
}

/// The SQLSTATE, or nothing if it was done.
async fn outcome(client: &Client, sql: &str) -> String {
    let answer = timeout(PATIENCE * 4, client.simple_query(sql)).await;
    match answer.expect("an answer in time") {
        Ok(_rows) => String::new(),
        Err(error) => match error.code() {
            Some(code) => code.code().to_owned(),
            None => panic!("{sql}: {error:?}"),
        },
    }
}

#[tokio::test]
async fn no_write_is_taken_for_a_read_whatever_the_grammar_comes_up_with() {
    let db = fresh_database().await;
    define_flow(&db, "greet").await;
    let primary = db.connect().await;
    primary.batch_execute(SURROUNDINGS).await.unwrap();
    let run = format!("select pgflow.start_flow('greet', '{{\"n\": 1}}', '{RUN}')");
    primary.batch_execute(&run).await.unwrap();
    replica_catches_up().await;
    let replica = db.connect_replica().await;
    let judges = [Judge::new(Reads::Pgflow), Judge::new(Reads::All)];
    let mut maker = Maker {
        chance: Chance::of(seed(), 1),
        until_write: None,
        writes: false,
    };
    let size = corpus_size();
    let (mut harmless, mut reads) = (0, [0, 0]);
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    let mut carried = Vec::new();
    let mut batch = Vec::new();
    for at in 0..size {
        let (statement, writes) = maker.statement();
        let said = judges.each_ref().map(|judge| judge.is_read(&statement));
        assert!(
            !(writes && (said[0] || said[1])),
            "taken for a read: {statement}"
        );
        assert!(
            said[1] || !said[0],
            "a read of pgflow's is a read: {statement}"
        );
        harmless += usize::from(!writes);
        for (count, said) in std::iter::zip(&mut reads, said) {
            *count += usize::from(said);
        }
        if said[1] {
            if carried.len() < CARRIED {
                carried.push((statement.clone(), said[0]));
            }
            batch.push(statement);
        }
        if batch.len() >= AT_ONCE || at + 1 == size {
            let answers = join_all(batch.iter().map(|sql| outcome(&replica, sql))).await;
            for (sql, code) in std::iter::zip(batch.drain(..), answers) {
                // What fails there for another reason than being a replica fails everywhere.
                if !code.is_empty() {
                    assert_eq!(outcome(&primary, &sql).await, code, "{sql}");
                }
                *outcomes.entry(code).or_default() += 1;
            }
        }
    }
    println!(
        "{size} statements, {harmless} harmless, {reads:?} reads (pgflow, all); on the replica {outcomes:?}"
    );
    assert!(!outcomes.contains_key("25006"));
    let done = outcomes.get("").copied().unwrap_or(0);
    assert!(done * 2 > reads[1], "most of what is asked can be answered");
    assert!(
        reads[1] * 2 > harmless && reads[0] * 5 > harmless,
        "reads are known as such"
    );
    assert_eq!(text(&primary, "select count(*) from public.log").await, "0");

    // And through a proxy: nothing comes back from the replica as not for it.
    for (reads, only) in [(Reads::All, false), (Reads::Pgflow, true)] {
        let proxy = Proxy::start(&db, |config| config.route.reads = reads).await;
        let client = proxy.connect().await;
        for (sql, pgflow) in &carried {
            if *pgflow || !only {
                let direct = outcome(&replica, sql).await;
                assert_eq!(outcome(&client, sql).await, direct, "{sql}");
            }
        }
        assert!(proxy.requests("replica") > 0);
        assert_eq!(
            proxy.metric("flowgate_reads_kept_total{why=\"refused\"}"),
            0
        );
        proxy.shut_down().await;
    }
}

/// The grammar's own, that have no row in `pg_proc`.
const NO_FUNCTIONS: &[&str] = &[
    "coalesce", "greatest", "grouping", "least", "nullif", "trim",
];
/// Volatile, as it says another time at every call; it reads a clock.
const CLOCKS: &[&str] = &["clock_timestamp"];

#[tokio::test]
async fn every_function_a_read_may_call_is_there_and_none_writes() {
    let db = fresh_database().await;
    define_flow(&db, "greet").await;
    let primary = db.connect().await;
    let run = format!("select pgflow.start_flow('greet', '{{}}', '{RUN}')");
    primary.batch_execute(&run).await.unwrap();
    replica_catches_up().await;
    let replica = db.connect_replica().await;
    let mut called = 0;
    for (schema, name) in Judge::functions() {
        let signature = format!(
            "select provolatile::text as volatility, array_to_string(coalesce(proargnames, '{{}}'), ' ') as names, \
             (select coalesce(string_agg(format_type(t, null), '|' order by n), '') from unnest(proargtypes) with ordinality a (t, n)) as types \
             from pg_proc where pronamespace = '{schema}'::regnamespace and proname = '{name}'"
        );
        let found = table(&primary, &signature).await;
        if schema == "pg_catalog" {
            if NO_FUNCTIONS.contains(&name) {
                assert!(found.is_empty() || name == "trim", "{name} is a function");
                continue;
            }
            assert!(!found.is_empty(), "{name} is not there");
            for row in found {
                let quiet = row["volatility"] != "v" || CLOCKS.contains(&name);
                assert!(quiet, "{name} is volatile: {row:?}");
            }
            continue;
        }
        // pgflow's and pgmq's say "volatile" of nearly everything: each is run where nothing can be written.
        for row in found {
            let names: Vec<&str> = row["names"].split(' ').collect();
            let types = row["types"].split('|').filter(|kind| !kind.is_empty());
            let arguments: Vec<String> = types
                .enumerate()
                .map(
                    |(at, kind)| match names.get(at).copied().unwrap_or_default() {
                        "run_id" | "p_run_id" => format!("'{RUN}'"),
                        "queue_name" | "flow_slug" | "p_flow_slug" | "slug" => "'greet'".to_owned(),
                        _ if kind == "jsonb" => "'{}'".to_owned(),
                        _ if kind == "numeric" || kind == "integer" => "1".to_owned(),
                        _ => format!("null::{kind}"),
                    },
                )
                .collect();
            let call = format!("select * from {schema}.{name}({})", arguments.join(", "));
            let answer = replica.simple_query(&call).await;
            let answer = answer.unwrap_or_else(|error| panic!("{call}: {error:?}"));
            let row = |message: &SimpleQueryMessage| matches!(message, SimpleQueryMessage::Row(_));
            assert!(answer.iter().any(row), "{call} said nothing");
            called += 1;
        }
    }
    assert!(called >= 5, "{called} were called");
}
