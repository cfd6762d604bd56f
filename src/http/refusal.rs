//! How a request is refused: status and the JSON that supabase-js reads. Decides nothing. Called by every surface of `http`.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::identity::{Identity, Unauthorized};
use crate::server::questions::DbError;

#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) code: String,
    pub(super) message: String,
    pub(super) details: Option<String>,
    pub(super) hint: Option<String>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            code: code.to_owned(),
            message: message.into(),
            details: None,
            hint: None,
        }
    }

    pub(super) fn bad_request(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(super) fn no_such_run() -> Self {
        Self::new(StatusCode::NOT_FOUND, "P0002", "no such run")
    }

    /// As PostgREST maps them, told apart for who is a stranger.
    pub(super) fn of_database(error: DbError, identity: Option<&Identity>) -> Self {
        let anonymous = identity.is_some_and(|identity| identity.anonymous);
        match error {
            DbError::Busy(_) => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "PGRST003",
                "Timed out acquiring connection from connection pool.",
            ),
            DbError::Unreachable(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "PGRST001",
                "the database cannot be reached",
            ),
            DbError::Role(message) => Self::new(StatusCode::FORBIDDEN, "42501", message),
            DbError::Postgres {
                code,
                message,
                detail,
                hint,
            } => Self {
                status: status_of(&code, anonymous),
                code,
                message,
                details: detail,
                hint,
            },
        }
    }

    pub(super) fn json(&self) -> String {
        json!({
            "code": self.code,
            "message": self.message,
            "details": self.details,
            "hint": self.hint,
        })
        .to_string()
    }
}

fn status_of(sqlstate: &str, anonymous: bool) -> StatusCode {
    match sqlstate {
        "23503" | "23505" => StatusCode::CONFLICT,
        "42501" if anonymous => StatusCode::UNAUTHORIZED,
        "42501" => StatusCode::FORBIDDEN,
        "42883" | "42P01" => StatusCode::NOT_FOUND,
        "25006" => StatusCode::METHOD_NOT_ALLOWED,
        "53400" => StatusCode::INTERNAL_SERVER_ERROR,
        _ => match sqlstate.get(..2).unwrap_or_default() {
            "08" | "53" => StatusCode::SERVICE_UNAVAILABLE,
            "28" | "0L" | "0P" => StatusCode::FORBIDDEN,
            "40" | "55" | "57" | "58" | "XX" | "25" => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        },
    }
}

impl From<Unauthorized> for Refusal {
    fn from(refused: Unauthorized) -> Self {
        Self::new(refused.status, refused.code, refused.message)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, JSON);
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");

/// JSON that is text already.
pub(super) fn json_text(text: String) -> Response {
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, JSON);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_postgres_says_has_its_status() {
        let check = |code: &str, anonymous, status: u16| {
            assert_eq!(status_of(code, anonymous).as_u16(), status, "{code}");
        };
        check("23503", false, 409);
        check("42501", true, 401);
        check("42501", false, 403);
        check("42P01", false, 404);
        check("25006", false, 405);
        check("53300", false, 503);
        check("53400", false, 500);
        check("57014", false, 500);
        check("P0001", false, 400);
        check("22P02", false, 400);
        check("", false, 400);
    }
}
