//! Is this statement provably a read? Two judges, and both must say yes. The first goes by tokens, cut as Postgres cuts
//! them: every word that can make a SELECT write is refused, every `name(` must be on a list. The second walks what
//! `sqlparser` makes of the same tokens, each node on a list of known ones: relations, types, column notation.
//! `sqlparser` never sees the client's text but these tokens written out again, literals replaced by their number, so
//! where its lexer differs from Postgres' there is nothing left to differ about. Called by `classify/mod.rs`.
//!
//! Why both: a deny-list forgets, and a parser for many dialects reads `select mytype 'x'` as a column with an alias
//! where Postgres calls a type's input function. What stays outside any proof from text: a user's overload of a
//! built-in name or operator that fits better than the built-in. Such a call still meets a server that refuses writes.

use super::RunRef;
use super::lexer::{Kind, Token};
use crate::config::Reads;
use crate::pgflow::functions::{Class, function};
use crate::pgflow::ids;
use crate::pgflow::tables::{Scope, TABLES, table};
use sqlparser::ast::*;
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use std::fmt::Write;

/// INVARIANT: bounds the depth of any tree built in a loop (`1+1+…`), which is dropped by recursion.
const TOKENS_MAX: usize = 1200;
const NESTING_MAX: usize = 24;

/// `Some`: reads only, and these are the runs whose state the answer depends on.
pub(super) fn read(text: &[u8], tokens: &[Token], reads: Reads) -> Option<RunRef> {
    let tokens = match tokens {
        [tokens @ .., last] if last.is(b';') => tokens,
        tokens => tokens,
    };
    if tokens.len() > TOKENS_MAX {
        return None;
    }
    let whole = Tokens { text, tokens };
    whole.refuse_words_that_write()?;
    let (sql, literals) = whole.rewritten()?;
    let parsed = Parser::new(&PostgreSqlDialect {})
        .try_with_sql(&sql)
        .ok()?
        .parse_statements()
        .ok()?;
    let [Statement::Query(query)] = parsed.as_slice() else {
        return None;
    };
    let mut walk = Walk {
        reads,
        literals,
        ctes: Vec::new(),
        scopes: Vec::new(),
        runs: Runs::default(),
    };
    walk.query(query)?;
    // `select 'pgflow'` reads nothing of ours: not what `route.reads = "pgflow"` is about.
    (reads == Reads::All || walk.runs.mentions > 0).then_some(())?;
    walk.runs.together(query, &walk.literals)
}

// ---- The first judge: tokens ----

#[derive(Clone, Copy)]
struct Tokens<'a> {
    text: &'a [u8],
    tokens: &'a [Token],
}

/// Any of these unquoted, wherever it stands, and the statement is no read. Some could be innocent (`substring(x for
/// 2)`, a column called `update`): they go to the primary.
const WRITING: &[&str] = &[
    "into",
    "for",
    "insert",
    "update",
    "delete",
    "merge",
    "truncate",
    "returning",
    "share",
    "tablesample",
    "xmltable",
    "json_table",
    "operator",
    "variadic",
    "copy",
    "call",
    "do",
    "execute",
    "prepare",
    "create",
    "drop",
    "alter",
    "grant",
    "revoke",
    "lock",
    "explain",
    "show",
    "set",
    "uescape",
    "repeatable",
    "treat",
    "xmlparse",
    "xmlserialize",
];

/// Words that may stand before `(` without being called.
const SYNTAX: &[&str] = &[
    "select",
    "from",
    "where",
    "in",
    "any",
    "all",
    "some",
    "exists",
    "and",
    "or",
    "not",
    "on",
    "using",
    "values",
    "join",
    "as",
    "over",
    "filter",
    "when",
    "then",
    "else",
    "case",
    "by",
    "having",
    "limit",
    "offset",
    "union",
    "except",
    "intersect",
    "distinct",
    "between",
    "like",
    "ilike",
    "is",
    "row",
    "array",
    "cast",
    "extract",
    "with",
    "group",
    "materialized",
    "lateral",
    "similar",
    "escape",
    "sets",
    "rollup",
    "cube",
];

/// Words that may stand before a literal: keywords, and types whose input is Postgres' own.
const BEFORE_LITERAL: &[&str] = &[
    "select",
    "where",
    "in",
    "and",
    "or",
    "not",
    "on",
    "when",
    "then",
    "else",
    "case",
    "by",
    "having",
    "limit",
    "offset",
    "between",
    "like",
    "ilike",
    "escape",
    "is",
    "from",
    "distinct",
    "to",
    "all",
    "uuid",
    "text",
    "interval",
    "timestamp",
    "timestamptz",
    "date",
    "time",
    "jsonb",
    "json",
    "zone",
];

const OPERATORS: &[&str] = &[
    "+", "-", "*", "/", "%", "^", "=", "<>", "!=", "<", ">", "<=", ">=", "||", "->", "->>", "#>",
    "#>>", "@>", "<@", "?", "?|", "?&", "&&", "~", "~*", "!~", "!~*", "~~", "~~*", "!~~", "!~~*",
    "#-", "@?", "@@", "::", "=>", ":=",
];

impl Tokens<'_> {
    fn refuse_words_that_write(self) -> Option<()> {
        let first = self.tokens.first()?;
        let begins = ["select", "with", "values", "table"]
            .iter()
            .any(|word| first.is_word(self.text, word));
        if !begins && !first.is(b'(') {
            return None;
        }
        let mut depth = 0_usize;
        for (at, token) in self.tokens.iter().enumerate() {
            match token.kind {
                Kind::Word if self.one_of(at, WRITING) => return None,
                Kind::Word | Kind::Quoted | Kind::Param(_) | Kind::Number => {}
                Kind::Text | Kind::Dollar => self.literal_fits(at)?,
                Kind::Operator => {
                    let known = OPERATORS
                        .iter()
                        .any(|op| op.as_bytes() == token.bytes(self.text));
                    known.then_some(())?;
                }
                Kind::Punct(b'(') => {
                    depth += 1;
                    self.call_fits(at)?;
                }
                Kind::Punct(b'[') => depth += 1,
                Kind::Punct(b')' | b']') => depth = depth.checked_sub(1)?,
                Kind::Punct(b';' | b':') | Kind::Exotic | Kind::Junk => return None,
                Kind::Punct(_) => {}
            }
            if depth > NESTING_MAX {
                return None;
            }
        }
        (depth == 0).then_some(())
    }

    fn one_of(self, at: usize, words: &[&str]) -> bool {
        words
            .iter()
            .any(|word| self.tokens[at].is_word(self.text, word))
    }

    /// `'x'` after a name would be `type 'x'`, after another literal a continuation.
    fn literal_fits(self, at: usize) -> Option<()> {
        let Some(before) = at.checked_sub(1) else {
            return Some(());
        };
        match self.tokens[before].kind {
            Kind::Word => self.one_of(before, BEFORE_LITERAL).then_some(()),
            Kind::Operator => Some(()),
            Kind::Punct(byte) => matches!(byte, b'(' | b'[' | b',').then_some(()),
            Kind::Quoted
            | Kind::Text
            | Kind::Dollar
            | Kind::Exotic
            | Kind::Param(_)
            | Kind::Number
            | Kind::Junk => None,
        }
    }

    /// What stands before a `(`: nothing callable, or a function on a list.
    fn call_fits(self, open: usize) -> Option<()> {
        let Some(last) = open.checked_sub(1) else {
            return Some(());
        };
        match self.tokens[last].kind {
            Kind::Operator => return Some(()),
            Kind::Punct(byte) => return matches!(byte, b'(' | b'[' | b',').then_some(()),
            Kind::Word | Kind::Quoted => {}
            Kind::Text
            | Kind::Dollar
            | Kind::Exotic
            | Kind::Param(_)
            | Kind::Number
            | Kind::Junk => return None,
        }
        let name = self.tokens[last].name(self.text)?;
        let dotted = last >= 1 && self.tokens[last - 1].is(b'.');
        if !dotted {
            let alias = last >= 1 && self.one_of(last - 1, &["as", "with", "recursive"]);
            let word = self.tokens[last].kind == Kind::Word;
            let known = (word
                && (SYNTAX.contains(&name.as_str()) || SIZED_TYPES.contains(&name.as_str())))
                || FUNCTIONS.contains(&name.as_str());
            return (alias || known).then_some(());
        }
        let schema = self.tokens.get(last.checked_sub(2)?)?.name(self.text)?;
        if last >= 3 && self.tokens[last - 3].is(b'.') {
            return None;
        }
        known_function(&[schema, name]).then_some(())
    }

    /// The statement in a spelling on which all lexers agree: words folded, names quoted as they were, literals by number.
    fn rewritten(self) -> Option<(String, Vec<String>)> {
        let mut sql = String::with_capacity(self.tokens.len() * 6);
        let mut literals = Vec::new();
        for (at, token) in self.tokens.iter().enumerate() {
            match token.kind {
                // `sqlparser` knows this spelling only inside another query.
                Kind::Word if at == 0 && token.is_word(self.text, "table") => {
                    sql.push_str("select * from")
                }
                Kind::Word => sql.push_str(&token.name(self.text)?),
                // The old spelling of a named argument.
                Kind::Operator if token.bytes(self.text) == b":=" => sql.push_str("=>"),
                Kind::Text | Kind::Dollar => {
                    write!(sql, "'{}'", literals.len()).ok()?;
                    literals.push(token.literal(self.text)?);
                }
                Kind::Quoted | Kind::Param(_) | Kind::Number | Kind::Operator | Kind::Punct(_) => {
                    sql.push_str(std::str::from_utf8(token.bytes(self.text)).ok()?);
                }
                Kind::Exotic | Kind::Junk => return None,
            }
            sql.push(' ');
        }
        Some((sql, literals))
    }
}

/// Built-in functions that read nothing but their arguments, aggregates and window functions; names with arguments of
/// another kind that a user could overload are few. None sleeps, locks, sets, sends, or sees transaction ids.
pub(super) const FUNCTIONS: &[&str] = &[
    "abs",
    "age",
    "array_agg",
    "array_append",
    "array_cat",
    "array_length",
    "array_position",
    "array_remove",
    "array_to_json",
    "array_to_string",
    "array_upper",
    "avg",
    "bool_and",
    "bool_or",
    "btrim",
    "cardinality",
    "ceil",
    "ceiling",
    "char_length",
    "clock_timestamp",
    "coalesce",
    "concat",
    "concat_ws",
    "count",
    "cume_dist",
    "date_bin",
    "date_part",
    "date_trunc",
    "dense_rank",
    "encode",
    "every",
    "first_value",
    "floor",
    "format",
    "generate_series",
    "generate_subscripts",
    "greatest",
    "grouping",
    "initcap",
    "json_agg",
    "json_array_elements",
    "json_array_elements_text",
    "json_array_length",
    "json_build_array",
    "json_build_object",
    "json_each",
    "json_each_text",
    "json_extract_path",
    "json_extract_path_text",
    "json_object_agg",
    "json_object_keys",
    "json_typeof",
    "jsonb_agg",
    "jsonb_array_elements",
    "jsonb_array_elements_text",
    "jsonb_array_length",
    "jsonb_build_array",
    "jsonb_build_object",
    "jsonb_each",
    "jsonb_each_text",
    "jsonb_extract_path",
    "jsonb_extract_path_text",
    "jsonb_object_agg",
    "jsonb_object_keys",
    "jsonb_path_exists",
    "jsonb_path_query",
    "jsonb_path_query_array",
    "jsonb_path_query_first",
    "jsonb_pretty",
    "jsonb_set",
    "jsonb_strip_nulls",
    "jsonb_typeof",
    "lag",
    "last_value",
    "lead",
    "least",
    "left",
    "length",
    "lower",
    "lpad",
    "ltrim",
    "make_interval",
    "max",
    "md5",
    "min",
    "mod",
    "mode",
    "now",
    "nth_value",
    "ntile",
    "nullif",
    "octet_length",
    "percent_rank",
    "percentile_cont",
    "percentile_disc",
    "position",
    "power",
    "rank",
    "regexp_replace",
    "replace",
    "reverse",
    "right",
    "round",
    "row_number",
    "row_to_json",
    "rpad",
    "rtrim",
    "sign",
    "split_part",
    "sqrt",
    "statement_timestamp",
    "stddev",
    "string_agg",
    "string_to_array",
    "strpos",
    "substr",
    "substring",
    "sum",
    "to_char",
    "to_json",
    "to_jsonb",
    "to_timestamp",
    "trim",
    "trunc",
    "unnest",
    "upper",
    "variance",
];

/// Types that are written with a size in parentheses.
const SIZED_TYPES: &[&str] = &[
    "varchar",
    "char",
    "numeric",
    "decimal",
    "timestamp",
    "timestamptz",
    "time",
    "interval",
    "bit",
    "varying",
    "character",
];

fn known_function(name: &[String]) -> bool {
    match name {
        [name] => FUNCTIONS.contains(&name.as_str()),
        [schema, name] if schema == "pg_catalog" => FUNCTIONS.contains(&name.as_str()),
        [schema, name] => {
            function(schema, name).is_some_and(|function| function.class == Class::Read)
        }
        _ => false,
    }
}

// ---- The second judge: the tree ----

/// Every method: `None` is "not provably a read".
struct Walk {
    reads: Reads,
    literals: Vec<String>,
    /// WITH names in sight, with their columns.
    ctes: Vec<(String, Vec<String>)>,
    /// FROM lists in sight, innermost last.
    scopes: Vec<Vec<Source>>,
    runs: Runs,
}

struct Source {
    name: String,
    columns: Columns,
}

#[derive(Clone)]
enum Columns {
    Known(Vec<String>),
    /// A user's table (`route.reads = "all"`).
    Any,
}

/// The runs a statement mentions.
#[derive(Default)]
struct Runs {
    /// Tables and functions of pgflow's and pgmq's.
    mentions: usize,
    /// How many tables with a `run_id` it reads, at any depth.
    tables: usize,
    /// Runs named by calls.
    calls: Vec<RunRef>,
}

fn all<T>(items: &[T], mut each: impl FnMut(&T) -> Option<()>) -> Option<()> {
    items.iter().try_for_each(|item| each(item).ok_or(())).ok()
}

fn names(name: &ObjectName) -> Option<Vec<String>> {
    name.0
        .iter()
        .map(|part| part.as_ident().map(|ident| ident.value.clone()))
        .collect()
}

impl Walk {
    /// Returns the names of its columns, as far as they have any.
    fn query(&mut self, query: &Query) -> Option<Vec<String>> {
        let Query {
            with,
            body,
            order_by,
            limit_clause,
            fetch,
            locks,
            for_clause,
            settings,
            format_clause,
            pipe_operators,
        } = query;
        let plain = locks.is_empty()
            && for_clause.is_none()
            && settings.is_none()
            && format_clause.is_none()
            && pipe_operators.is_empty();
        plain.then_some(())?;
        let ctes = self.ctes.len();
        if let Some(with) = with {
            self.with(with)?;
        }
        // ORDER BY and LIMIT see the body's FROM list, if the body is a SELECT.
        let scopes = self.scopes.len();
        let columns = self.set_expr(body)?;
        match order_by {
            None => {}
            Some(OrderBy {
                kind: OrderByKind::Expressions(exprs),
                interpolate: None,
            }) => {
                all(exprs, |expr| self.order_by(expr))?;
            }
            Some(_) => return None,
        }
        self.scopes.truncate(scopes);
        match limit_clause {
            None => {}
            Some(LimitClause::LimitOffset {
                limit,
                offset,
                limit_by,
            }) if limit_by.is_empty() => {
                self.option(limit.as_ref())?;
                self.option(offset.as_ref().map(|offset| &offset.value))?;
            }
            Some(_) => return None,
        }
        if let Some(Fetch {
            with_ties: _,
            percent: false,
            quantity,
        }) = fetch
        {
            self.option(quantity.as_ref())?;
        } else if fetch.is_some() {
            return None;
        }
        self.ctes.truncate(ctes);
        Some(columns)
    }

    fn with(&mut self, with: &With) -> Option<()> {
        if with.recursive {
            // Any of them may name any other; what columns they have is known only from their lists.
            for cte in &with.cte_tables {
                self.ctes
                    .push((cte.alias.name.value.clone(), column_list(&cte.alias)));
            }
        }
        for cte in &with.cte_tables {
            cte.from.is_none().then_some(())?;
            let columns = self.nested(&cte.query)?;
            if !with.recursive {
                self.ctes
                    .push((cte.alias.name.value.clone(), renamed(columns, &cte.alias)));
            }
        }
        Some(())
    }

    /// A query that sees no FROM list around it.
    fn nested(&mut self, query: &Query) -> Option<Vec<String>> {
        let outer = std::mem::take(&mut self.scopes);
        let columns = self.query(query);
        self.scopes = outer;
        columns
    }

    /// Leaves a SELECT's FROM list in sight for ORDER BY; the caller takes it away.
    fn set_expr(&mut self, body: &SetExpr) -> Option<Vec<String>> {
        match body {
            SetExpr::Select(select) => self.select(select),
            SetExpr::Query(query) => self.query(query),
            SetExpr::SetOperation {
                left,
                op: _,
                set_quantifier: _,
                right,
            } => {
                let scopes = self.scopes.len();
                let columns = self.set_expr(left)?;
                self.scopes.truncate(scopes);
                self.set_expr(right)?;
                self.scopes.truncate(scopes);
                Some(columns)
            }
            SetExpr::Values(Values {
                explicit_row: false,
                value_keyword: false,
                rows,
            }) => {
                all(rows, |row| all(&row.content, |expr| self.expr(expr)))?;
                Some(Vec::new())
            }
            SetExpr::Table(named) => {
                let name = match (&named.schema_name, &named.table_name) {
                    (Some(schema), Some(name)) => vec![schema.clone(), name.clone()],
                    (None, Some(name)) => vec![name.clone()],
                    (Some(_) | None, None) => return None,
                };
                match self.relation(&name)? {
                    Columns::Known(columns) => Some(columns),
                    Columns::Any => Some(Vec::new()),
                }
            }
            SetExpr::Values(_)
            | SetExpr::Insert(_)
            | SetExpr::Update(_)
            | SetExpr::Delete(_)
            | SetExpr::Merge(_) => None,
        }
    }

    fn select(&mut self, select: &Select) -> Option<Vec<String>> {
        let Select {
            select_token: _,
            optimizer_hints,
            distinct,
            select_modifiers,
            top,
            top_before_distinct: _,
            projection,
            exclude,
            into,
            from,
            lateral_views,
            prewhere,
            selection,
            connect_by,
            group_by,
            cluster_by,
            distribute_by,
            sort_by,
            having,
            named_window,
            qualify,
            window_before_qualify: _,
            value_table_mode,
            flavor,
        } = select;
        let plain = optimizer_hints.is_empty()
            && select_modifiers.is_none()
            && top.is_none()
            && exclude.is_none()
            && into.is_none()
            && lateral_views.is_empty()
            && prewhere.is_none()
            && connect_by.is_empty()
            && cluster_by.is_empty()
            && distribute_by.is_empty()
            && sort_by.is_empty()
            && qualify.is_none()
            && value_table_mode.is_none()
            && *flavor == SelectFlavor::Standard;
        plain.then_some(())?;
        // One list grows as it is read, so that LATERAL and ON see what stands to their left.
        self.scopes.push(Vec::new());
        all(from, |item| self.table_with_joins(item))?;
        self.option(selection.as_ref())?;
        self.option(having.as_ref())?;
        match distinct {
            None | Some(Distinct::All | Distinct::Distinct) => {}
            Some(Distinct::On(exprs)) => self.exprs(exprs)?,
        }
        match group_by {
            GroupByExpr::Expressions(exprs, modifiers) if modifiers.is_empty() => {
                self.exprs(exprs)?
            }
            GroupByExpr::Expressions(..) | GroupByExpr::All(_) => return None,
        }
        all(named_window, |window| match &window.1 {
            NamedWindowExpr::NamedWindow(_) => Some(()),
            NamedWindowExpr::WindowSpec(spec) => self.window(spec),
        })?;
        let mut columns = Vec::new();
        for item in projection {
            self.select_item(item, &mut columns)?;
        }
        Some(columns)
    }

    fn select_item(&mut self, item: &SelectItem, columns: &mut Vec<String>) -> Option<()> {
        match item {
            SelectItem::UnnamedExpr(expr) => {
                self.expr(expr)?;
                columns.extend(column_name(expr));
            }
            SelectItem::ExprWithAlias { expr, alias } => {
                self.expr(expr)?;
                columns.push(alias.value.clone());
            }
            SelectItem::Wildcard(options) => {
                plain_wildcard(options)?;
                for source in self.scopes.last()? {
                    if let Columns::Known(known) = &source.columns {
                        columns.extend(known.iter().cloned());
                    }
                }
            }
            SelectItem::QualifiedWildcard(
                SelectItemQualifiedWildcardKind::ObjectName(name),
                options,
            ) => {
                plain_wildcard(options)?;
                if let Columns::Known(known) = self.source(&names(name)?)? {
                    columns.extend(known.iter().cloned());
                }
            }
            // `(f()).*` calls f once a column.
            SelectItem::QualifiedWildcard(SelectItemQualifiedWildcardKind::Expr(_), _)
            | SelectItem::ExprWithAliases { .. } => return None,
        }
        Some(())
    }

    fn table_with_joins(&mut self, item: &TableWithJoins) -> Option<()> {
        self.table_factor(&item.relation)?;
        all(&item.joins, |join| {
            (!join.global).then_some(())?;
            self.table_factor(&join.relation)?;
            match constraint(&join.join_operator)? {
                JoinConstraint::On(expr) => self.expr(expr),
                JoinConstraint::Using(_) | JoinConstraint::Natural | JoinConstraint::None => {
                    Some(())
                }
            }
        })
    }

    fn table_factor(&mut self, factor: &TableFactor) -> Option<()> {
        match factor {
            TableFactor::Table {
                name,
                alias,
                args,
                with_hints,
                version: None,
                with_ordinality,
                partitions,
                json_path: None,
                sample: None,
                index_hints,
            } if with_hints.is_empty() && partitions.is_empty() && index_hints.is_empty() => {
                let name = names(name)?;
                let columns = match args {
                    None if *with_ordinality => return None,
                    None => self.relation(&name)?,
                    Some(TableFunctionArgs {
                        args,
                        settings: None,
                    }) => self.table_function(&name, args)?,
                    Some(_) => return None,
                };
                self.add(name.last()?.clone(), columns, alias.as_ref())
            }
            TableFactor::Function {
                lateral: _,
                name,
                args,
                with_ordinality: _,
                alias,
            } => {
                let name = names(name)?;
                let columns = self.table_function(&name, args)?;
                self.add(name.last()?.clone(), columns, alias.as_ref())
            }
            TableFactor::UNNEST {
                alias,
                array_exprs,
                with_offset: false,
                with_offset_alias: None,
                with_ordinality: _,
            } => {
                self.exprs(array_exprs)?;
                self.add(
                    "unnest".into(),
                    Columns::Known(vec!["unnest".into(), "ordinality".into()]),
                    alias.as_ref(),
                )
            }
            TableFactor::Derived {
                lateral: _,
                subquery,
                alias,
                sample: None,
            } => {
                let columns = self.query(subquery)?;
                self.add(String::new(), Columns::Known(columns), alias.as_ref())
            }
            TableFactor::NestedJoin {
                table_with_joins,
                alias: None,
            } => self.table_with_joins(table_with_joins),
            _ => None,
        }
    }

    /// A function in FROM. Its columns, where it is one of several.
    fn table_function(&mut self, name: &[String], args: &[FunctionArg]) -> Option<Columns> {
        known_function(name).then_some(())?;
        all(args, |arg| self.function_arg(arg))?;
        self.note_call(name, args);
        let last = name.last()?.as_str();
        let columns: &[&str] = match last {
            "jsonb_each" | "json_each" | "jsonb_each_text" | "json_each_text" => &["key", "value"],
            "jsonb_array_elements"
            | "json_array_elements"
            | "jsonb_array_elements_text"
            | "json_array_elements_text" => &["value"],
            "metrics" | "metrics_all" => &[
                "queue_name",
                "queue_length",
                "newest_msg_age_sec",
                "oldest_msg_age_sec",
                "total_messages",
                "scrape_time",
            ],
            "list_queues" => &["queue_name", "created_at", "is_partitioned", "is_unlogged"],
            scalar => &[scalar],
        };
        Some(Columns::Known(
            columns.iter().map(|name| (*name).to_owned()).collect(),
        ))
    }

    fn add(&mut self, name: String, columns: Columns, alias: Option<&TableAlias>) -> Option<()> {
        let source = match alias {
            None => Source { name, columns },
            Some(alias) => {
                // `as t(a int, b text)` is for functions that return records.
                alias
                    .columns
                    .iter()
                    .all(|column| column.data_type.is_none())
                    .then_some(())?;
                alias.at.is_none().then_some(())?;
                let columns = match columns {
                    Columns::Known(columns) => Columns::Known(renamed(columns, alias)),
                    Columns::Any => Columns::Any,
                };
                Source {
                    name: alias.name.value.clone(),
                    columns,
                }
            }
        };
        self.scopes.last_mut()?.push(source);
        Some(())
    }

    fn relation(&mut self, name: &[String]) -> Option<Columns> {
        if let [name] = name
            && let Some((_, columns)) = self.ctes.iter().rev().find(|(cte, _)| cte == name)
        {
            return Some(Columns::Known(columns.clone()));
        }
        match name {
            [schema, name] if schema == "pgflow" => {
                let table = table(name)?;
                self.runs.mentions += 1;
                self.runs.tables += usize::from(table.scope == Scope::Run);
                Some(Columns::Known(
                    table
                        .columns
                        .iter()
                        .map(|column| (*column).to_owned())
                        .collect(),
                ))
            }
            [.., name] if self.reads == Reads::All && name.starts_with("pg_") => {
                CATALOGS.contains(&name.as_str()).then_some(Columns::Any)
            }
            [schema, _] if self.reads == Reads::All => {
                (!schema.starts_with("pg_temp")).then(|| {
                    // Any table may hold what a run did.
                    self.runs.calls.push(RunRef::All);
                    Columns::Any
                })
            }
            [_] if self.reads == Reads::All => {
                self.runs.calls.push(RunRef::All);
                Some(Columns::Any)
            }
            _ => None,
        }
    }

    fn source(&self, name: &[String]) -> Option<Columns> {
        let wanted = match name {
            [name] => name,
            [schema, name] if schema == "pgflow" || self.reads == Reads::All => name,
            _ => return None,
        };
        let source = self
            .scopes
            .iter()
            .rev()
            .flatten()
            .find(|source| source.name == *wanted)?;
        Some(source.columns.clone())
    }

    fn exprs(&mut self, exprs: &[Expr]) -> Option<()> {
        all(exprs, |expr| self.expr(expr))
    }

    fn option(&mut self, expr: Option<&Expr>) -> Option<()> {
        expr.map_or(Some(()), |expr| self.expr(expr))
    }

    fn subquery(&mut self, query: &Query) -> Option<()> {
        self.query(query).map(drop)
    }

    fn expr(&mut self, expr: &Expr) -> Option<()> {
        match expr {
            // A bare name is a column or a whole row, never a call.
            Expr::Identifier(_) => Some(()),
            Expr::CompoundIdentifier(parts) => self.column(parts),
            Expr::Value(value) => known_value(&value.value),
            Expr::TypedString(typed) => {
                (!typed.uses_odbc_syntax).then_some(())?;
                known_type(&typed.data_type)
            }
            Expr::Nested(inner)
            | Expr::IsFalse(inner)
            | Expr::IsNotFalse(inner)
            | Expr::IsTrue(inner)
            | Expr::IsNotTrue(inner)
            | Expr::IsNull(inner)
            | Expr::IsNotNull(inner)
            | Expr::IsUnknown(inner)
            | Expr::IsNotUnknown(inner) => self.expr(inner),
            Expr::UnaryOp {
                op: UnaryOperator::Not | UnaryOperator::Minus | UnaryOperator::Plus,
                expr,
            } => self.expr(expr),
            // Which operators there are the first judge has seen.
            Expr::BinaryOp { left, op, right } => {
                (!matches!(op, BinaryOperator::PGCustomBinaryOperator(_))).then_some(())?;
                self.expr(left)?;
                self.expr(right)
            }
            Expr::IsDistinctFrom(left, right) | Expr::IsNotDistinctFrom(left, right) => {
                self.expr(left)?;
                self.expr(right)
            }
            Expr::AnyOp {
                left,
                compare_op: _,
                right,
                is_some: _,
            }
            | Expr::AllOp {
                left,
                compare_op: _,
                right,
            } => {
                self.expr(left)?;
                self.expr(right)
            }
            Expr::InList {
                expr,
                list,
                negated: _,
            } => {
                self.expr(expr)?;
                self.exprs(list)
            }
            Expr::InSubquery {
                expr,
                subquery,
                negated: _,
            } => {
                self.expr(expr)?;
                self.subquery(subquery)
            }
            Expr::Between {
                expr,
                negated: _,
                low,
                high,
            } => {
                self.expr(expr)?;
                self.expr(low)?;
                self.expr(high)
            }
            Expr::Like {
                negated: _,
                any: false,
                expr,
                pattern,
                escape_char,
            }
            | Expr::ILike {
                negated: _,
                any: false,
                expr,
                pattern,
                escape_char,
            }
            | Expr::SimilarTo {
                negated: _,
                expr,
                pattern,
                escape_char,
            } => {
                self.expr(expr)?;
                self.expr(pattern)?;
                self.option(escape_char.as_deref())
            }
            Expr::Cast {
                kind: CastKind::Cast | CastKind::DoubleColon,
                expr,
                data_type,
                format: None,
            } => {
                known_type(data_type)?;
                self.expr(expr)
            }
            Expr::AtTimeZone {
                timestamp,
                time_zone,
            } => {
                self.expr(timestamp)?;
                self.expr(time_zone)
            }
            Expr::Extract {
                field: _,
                syntax: ExtractSyntax::From,
                expr,
            } => self.expr(expr),
            Expr::Ceil {
                expr,
                field: CeilFloorKind::DateTimeField(DateTimeField::NoDateTime),
            }
            | Expr::Floor {
                expr,
                field: CeilFloorKind::DateTimeField(DateTimeField::NoDateTime),
            } => self.expr(expr),
            Expr::Position { expr, r#in } => {
                self.expr(expr)?;
                self.expr(r#in)
            }
            Expr::Substring {
                expr,
                substring_from,
                substring_for,
                special: _,
                shorthand: _,
            } => {
                self.expr(expr)?;
                self.option(substring_from.as_deref())?;
                self.option(substring_for.as_deref())
            }
            Expr::Trim {
                trim_where: _,
                trim_what,
                expr,
                trim_characters: None,
            } => {
                self.expr(expr)?;
                self.option(trim_what.as_deref())
            }
            Expr::Function(function) => self.function(function),
            Expr::Case {
                case_token: _,
                end_token: _,
                operand,
                conditions,
                else_result,
            } => {
                self.option(operand.as_deref())?;
                all(conditions, |when| {
                    self.expr(&when.condition)?;
                    self.expr(&when.result)
                })?;
                self.option(else_result.as_deref())
            }
            Expr::Exists {
                subquery,
                negated: _,
            }
            | Expr::Subquery(subquery) => self.subquery(subquery),
            Expr::GroupingSets(sets) | Expr::Cube(sets) | Expr::Rollup(sets) => {
                all(sets, |set| self.exprs(set))
            }
            Expr::Tuple(exprs) => self.exprs(exprs),
            Expr::Array(array) => self.exprs(&array.elem),
            Expr::Interval(interval) => self.expr(&interval.value),
            // Subscripts only: `.f` may be a call.
            Expr::CompoundFieldAccess { root, access_chain } => {
                self.expr(root)?;
                all(access_chain, |access| match access {
                    AccessExpr::Subscript(Subscript::Index { index }) => self.expr(index),
                    AccessExpr::Subscript(Subscript::Slice { .. }) | AccessExpr::Dot(_) => None,
                })
            }
            // All others are other dialects', or too rare to prove.
            _ => None,
        }
    }

    /// `t.c` is `c(t)` where t has no column c, so it must have one.
    fn column(&self, parts: &[Ident]) -> Option<()> {
        let (column, source) = parts.split_last()?;
        let source: Vec<_> = source.iter().map(|part| part.value.clone()).collect();
        match self.source(&source)? {
            Columns::Known(columns) => columns.contains(&column.value).then_some(()),
            Columns::Any => Some(()),
        }
    }

    fn function(&mut self, function: &Function) -> Option<()> {
        let Function {
            name,
            uses_odbc_syntax,
            parameters,
            args,
            within_group,
            filter,
            null_treatment: _,
            over,
        } = function;
        let name = names(name)?;
        (!uses_odbc_syntax && *parameters == FunctionArguments::None).then_some(())?;
        match args {
            // `current_timestamp` and the like: only keywords come without parentheses.
            FunctionArguments::None => KEYWORD_FUNCTIONS
                .contains(&name.first()?.as_str())
                .then_some(())?,
            FunctionArguments::Subquery(query) => {
                (name == ["array"] || name == ["exists"] || known_function(&name)).then_some(())?;
                self.subquery(query)?;
            }
            FunctionArguments::List(list) => {
                known_function(&name).then_some(())?;
                all(&list.args, |arg| self.function_arg(arg))?;
                all(&list.clauses, |clause| match clause {
                    FunctionArgumentClause::OrderBy(exprs) => {
                        all(exprs, |expr| self.order_by(expr))
                    }
                    _ => None,
                })?;
                self.note_call(&name, &list.args);
            }
        }
        all(within_group, |expr| self.order_by(expr))?;
        self.option(filter.as_deref())?;
        match over {
            None | Some(WindowType::NamedWindow(_)) => Some(()),
            Some(WindowType::WindowSpec(spec)) => self.window(spec),
        }
    }

    fn function_arg(&mut self, arg: &FunctionArg) -> Option<()> {
        let arg = match arg {
            FunctionArg::Unnamed(arg) => arg,
            FunctionArg::Named {
                name: _,
                arg,
                operator: FunctionArgOperator::RightArrow | FunctionArgOperator::Assignment,
            } => arg,
            // The name is parsed as an expression where it could be one.
            FunctionArg::ExprNamed {
                name: Expr::Identifier(_),
                arg,
                operator: FunctionArgOperator::RightArrow | FunctionArgOperator::Assignment,
            } => arg,
            FunctionArg::Named { .. } | FunctionArg::ExprNamed { .. } => return None,
        };
        match arg {
            FunctionArgExpr::Expr(expr) => self.expr(expr),
            FunctionArgExpr::Wildcard => Some(()),
            FunctionArgExpr::QualifiedWildcard(_) | FunctionArgExpr::WildcardWithOptions(_) => None,
        }
    }

    /// Which run does a call of a known function read?
    fn note_call(&mut self, name: &[String], args: &[FunctionArg]) {
        let [schema, name] = name else { return };
        let Some(function) = function(schema, name) else {
            return;
        };
        self.runs.mentions += 1;
        let Some(place) = function.run_arg() else {
            // Queues change with every run; shapes and slugs with none.
            if function.schema == "pgmq" {
                self.runs.calls.push(RunRef::All);
            }
            return;
        };
        let value = args.iter().enumerate().find_map(|(at, arg)| match arg {
            FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) if at == place => Some(expr),
            FunctionArg::Named {
                name,
                arg: FunctionArgExpr::Expr(expr),
                operator: _,
            }
            | FunctionArg::ExprNamed {
                name: Expr::Identifier(name),
                arg: FunctionArgExpr::Expr(expr),
                operator: _,
            } if name.value == function.args[place] => Some(expr),
            _ => None,
        });
        let run = value
            .and_then(|expr| run_value(expr, &self.literals))
            .unwrap_or(RunRef::All);
        self.runs.calls.push(run);
    }

    fn window(&mut self, spec: &WindowSpec) -> Option<()> {
        self.exprs(&spec.partition_by)?;
        all(&spec.order_by, |expr| self.order_by(expr))?;
        let Some(frame) = &spec.window_frame else {
            return Some(());
        };
        for bound in [Some(&frame.start_bound), frame.end_bound.as_ref()]
            .into_iter()
            .flatten()
        {
            match bound {
                WindowFrameBound::CurrentRow => {}
                WindowFrameBound::Preceding(expr) | WindowFrameBound::Following(expr) => {
                    self.option(expr.as_deref())?
                }
            }
        }
        Some(())
    }

    fn order_by(&mut self, by: &OrderByExpr) -> Option<()> {
        let plain =
            by.with_fill.is_none() && !matches!(by.options.sort, Some(OrderBySort::Using(_)));
        plain.then_some(())?;
        self.expr(&by.expr)
    }
}

/// Functions called without parentheses.
const KEYWORD_FUNCTIONS: &[&str] = &[
    "current_timestamp",
    "current_date",
    "current_time",
    "localtimestamp",
    "localtime",
];

/// Catalogs that are the same on primary and replica; statistics, locks and settings are a server's own.
const CATALOGS: &[&str] = &[
    "pg_attrdef",
    "pg_attribute",
    "pg_class",
    "pg_collation",
    "pg_constraint",
    "pg_depend",
    "pg_description",
    "pg_enum",
    "pg_index",
    "pg_indexes",
    "pg_inherits",
    "pg_namespace",
    "pg_proc",
    "pg_range",
    "pg_tables",
    "pg_type",
    "pg_views",
];

fn plain_wildcard(options: &WildcardAdditionalOptions) -> Option<()> {
    let WildcardAdditionalOptions {
        wildcard_token: _,
        opt_ilike,
        opt_exclude,
        opt_except,
        opt_replace,
        opt_rename,
        opt_alias,
    } = options;
    let plain = opt_ilike.is_none()
        && opt_exclude.is_none()
        && opt_except.is_none()
        && opt_replace.is_none()
        && opt_rename.is_none()
        && opt_alias.is_none();
    plain.then_some(())
}

fn column_list(alias: &TableAlias) -> Vec<String> {
    alias
        .columns
        .iter()
        .map(|column| column.name.value.clone())
        .collect()
}

/// A column list renames the first columns. Which the others are is uncertain where some have no name, so only a list
/// that is absent leaves them.
fn renamed(columns: Vec<String>, alias: &TableAlias) -> Vec<String> {
    if alias.columns.is_empty() {
        columns
    } else {
        column_list(alias)
    }
}

/// The name Postgres gives an expression in a select list, where that is plain.
fn column_name(expr: &Expr) -> Option<String> {
    match expr {
        Expr::Identifier(name) => Some(name.value.clone()),
        Expr::CompoundIdentifier(parts) => parts.last().map(|part| part.value.clone()),
        Expr::Function(function) => names(&function.name)?.pop(),
        _ => None,
    }
}

fn constraint(operator: &JoinOperator) -> Option<&JoinConstraint> {
    match operator {
        JoinOperator::Join(on)
        | JoinOperator::Inner(on)
        | JoinOperator::Left(on)
        | JoinOperator::LeftOuter(on)
        | JoinOperator::Right(on)
        | JoinOperator::RightOuter(on)
        | JoinOperator::FullOuter(on)
        | JoinOperator::CrossJoin(on) => Some(on),
        _ => None,
    }
}

fn known_value(value: &Value) -> Option<()> {
    match value {
        Value::Number(_, false)
        | Value::SingleQuotedString(_)
        | Value::Boolean(_)
        | Value::Null
        | Value::Placeholder(_) => Some(()),
        _ => None,
    }
}

/// Types whose input functions are Postgres' own.
fn known_type(kind: &DataType) -> Option<()> {
    match kind {
        DataType::Uuid
        | DataType::Text
        | DataType::Character(_)
        | DataType::Char(_)
        | DataType::CharacterVarying(_)
        | DataType::CharVarying(_)
        | DataType::Varchar(_)
        | DataType::Numeric(_)
        | DataType::Decimal(_)
        | DataType::Dec(_)
        | DataType::SmallInt(None)
        | DataType::Int2(None)
        | DataType::Int(None)
        | DataType::Int4(None)
        | DataType::Int8(None)
        | DataType::Integer(None)
        | DataType::BigInt(None)
        | DataType::Real
        | DataType::Float4
        | DataType::Float8
        | DataType::DoublePrecision
        | DataType::Bool
        | DataType::Boolean
        | DataType::Date
        | DataType::Time(..)
        | DataType::Timestamp(..)
        | DataType::Interval { .. }
        | DataType::JSON
        | DataType::JSONB
        | DataType::Bytea => Some(()),
        DataType::Array(ArrayElemTypeDef::SquareBracket(inner, None)) => known_type(inner),
        DataType::Custom(name, modifiers) if modifiers.is_empty() => {
            match names(name)?.as_slice() {
                [name] => matches!(name.as_str(), "oid" | "name" | "jsonpath").then_some(()),
                _ => None,
            }
        }
        _ => None,
    }
}

/// `$1`, `'…'`, in parentheses or cast to what a run id is.
fn run_value(expr: &Expr, literals: &[String]) -> Option<RunRef> {
    let value = match expr {
        Expr::Nested(inner) => return run_value(inner, literals),
        Expr::Cast {
            kind: _,
            expr,
            data_type: DataType::Uuid | DataType::Text,
            format: None,
        } => {
            return run_value(expr, literals);
        }
        Expr::TypedString(typed) if typed.data_type == DataType::Uuid => &typed.value.value,
        Expr::Value(value) => &value.value,
        _ => return None,
    };
    match value {
        Value::Placeholder(name) => name.strip_prefix('$')?.parse().ok().map(RunRef::Param),
        Value::SingleQuotedString(number) => {
            let literal = literals.get(number.parse::<usize>().ok()?)?;
            ids::run_id(literal).map(RunRef::Literal)
        }
        _ => None,
    }
}

// ---- Which run ----

impl Runs {
    /// The runs the whole statement depends on: one if everything that has a run is tied to it, else all.
    fn together(mut self, query: &Query, literals: &[String]) -> Option<RunRef> {
        if self.tables > 0 {
            let run = match &*query.body {
                SetExpr::Select(select) if query.with.is_none() => {
                    tied(select, self.tables, literals)
                }
                _ => None,
            };
            self.calls.push(run.unwrap_or(RunRef::All));
        }
        let Some(first) = self.calls.first().copied() else {
            return Some(RunRef::None);
        };
        let same = self.calls.iter().all(|run| *run == first);
        Some(if same { first } else { RunRef::All })
    }
}

/// Tables with a `run_id` in one FROM list; which of them must have equal ones; and what those equal.
struct Ties<'a> {
    tables: Vec<String>,
    /// `group[n] == group[m]`: tables n and m are joined on their runs.
    group: Vec<usize>,
    equal: Vec<(usize, RunRef)>,
    literals: &'a [String],
}

/// The one run a SELECT is about: `run_id = x` holds for every table that has one. INVARIANT: only conditions that each
/// row of the answer must meet count, so a disjunction or a condition in an outer join's ON names nothing by itself.
fn tied(select: &Select, tables: usize, literals: &[String]) -> Option<RunRef> {
    let mut ties = Ties {
        tables: Vec::new(),
        group: Vec::new(),
        equal: Vec::new(),
        literals,
    };
    for item in &select.from {
        ties.factor(&item.relation)?;
        for join in &item.joins {
            let new = ties.tables.len();
            ties.factor(&join.relation)?;
            match constraint(&join.join_operator)? {
                JoinConstraint::On(expr) => ties.join(expr, new, is_outer(&join.join_operator)),
                JoinConstraint::Using(columns) => {
                    let on_run = columns
                        .iter()
                        .any(|name| names(name).is_some_and(|name| name == ["run_id"]));
                    if on_run && new == 1 && ties.tables.len() == 2 {
                        ties.unite((0, 1));
                    }
                }
                JoinConstraint::Natural | JoinConstraint::None => {}
            }
        }
    }
    // Fewer here than in the whole statement: the others are in subqueries, tied to nothing we see.
    if ties.tables.len() != tables {
        return None;
    }
    ties.filter(select.selection.as_ref()?);
    let runs: Option<Vec<RunRef>> = (0..tables).map(|n| ties.run(n)).collect();
    let runs = runs?;
    let first = *runs.first()?;
    runs.iter().all(|run| *run == first).then_some(first)
}

fn is_outer(operator: &JoinOperator) -> bool {
    !matches!(
        operator,
        JoinOperator::Join(_) | JoinOperator::Inner(_) | JoinOperator::CrossJoin(_)
    )
}

/// The parts of `a AND b AND …`.
fn conjuncts<'a>(expr: &'a Expr, out: &mut Vec<&'a Expr>) {
    match expr {
        Expr::Nested(inner) => conjuncts(inner, out),
        Expr::BinaryOp {
            left,
            op: BinaryOperator::And,
            right,
        } => {
            conjuncts(left, out);
            conjuncts(right, out);
        }
        other => out.push(other),
    }
}

impl Ties<'_> {
    fn factor(&mut self, factor: &TableFactor) -> Option<()> {
        let (name, alias) = match factor {
            TableFactor::Table {
                name,
                alias,
                args: None,
                ..
            } => (name, alias),
            // A function or a subquery: the count of tables shows if it read runs.
            TableFactor::Table { .. }
            | TableFactor::Function { .. }
            | TableFactor::UNNEST { .. }
            | TableFactor::Derived { .. } => return Some(()),
            _ => return None,
        };
        let name = names(name)?;
        let [schema, name] = name.as_slice() else {
            return Some(());
        };
        let has_run = schema == "pgflow"
            && TABLES
                .iter()
                .any(|table| table.name == name && table.scope == Scope::Run);
        if has_run {
            self.group.push(self.tables.len());
            let known_as = alias.as_ref().map_or(name, |alias| &alias.name.value);
            self.tables.push(known_as.clone());
        }
        Some(())
    }

    fn run(&self, table: usize) -> Option<RunRef> {
        let mut equal = self.equal.iter();
        let found = equal.find(|(other, _)| self.group[*other] == self.group[table]);
        found.map(|(_, run)| *run)
    }

    fn unite(&mut self, (a, b): (usize, usize)) {
        let (from, to) = (self.group[b], self.group[a]);
        for group in &mut self.group {
            if *group == from {
                *group = to;
            }
        }
    }

    /// What ON says of the tables joined so far; those from `new` on are its right side. An outer join's ON says
    /// nothing of rows it finds no partner for, so only one tie of the new table to an old one counts: two would tie
    /// the old ones to each other.
    fn join(&mut self, on: &Expr, new: usize, outer: bool) {
        let mut parts = Vec::new();
        conjuncts(on, &mut parts);
        for part in parts {
            let Some((a, b)) = self.equal_runs(part) else {
                continue;
            };
            if !outer {
                self.unite((a, b));
            } else if a.min(b) < new && a.max(b) >= new {
                return self.unite((a, b));
            }
        }
    }

    fn equal_runs(&self, expr: &Expr) -> Option<(usize, usize)> {
        let Expr::BinaryOp {
            left,
            op: BinaryOperator::Eq,
            right,
        } = expr
        else {
            return None;
        };
        Some((self.run_column(left)?, self.run_column(right)?))
    }

    /// What WHERE says: true of every row of the answer.
    fn filter(&mut self, selection: &Expr) {
        let mut parts = Vec::new();
        conjuncts(selection, &mut parts);
        for part in &parts {
            if let Some(pair) = self.equal_runs(part) {
                self.unite(pair);
            }
        }
        for part in parts {
            let Expr::BinaryOp {
                left,
                op: BinaryOperator::Eq,
                right,
            } = part
            else {
                continue;
            };
            for (column, value) in [(left, right), (right, left)] {
                if let (Some(table), Some(run)) =
                    (self.run_column(column), run_value(value, self.literals))
                {
                    self.equal.push((table, run));
                }
            }
        }
    }

    fn run_column(&self, expr: &Expr) -> Option<usize> {
        match expr {
            Expr::Nested(inner) => self.run_column(inner),
            // Without a table's name it is this one's only if there is but one, or all are joined on it.
            Expr::Identifier(name) if name.value == "run_id" => {
                let first = *self.group.first()?;
                self.group.iter().all(|group| *group == first).then_some(0)
            }
            Expr::CompoundIdentifier(parts) => match parts.as_slice() {
                [table, column] if column.value == "run_id" => {
                    self.tables.iter().position(|name| *name == table.value)
                }
                _ => None,
            },
            _ => None,
        }
    }
}
