//! The API's description, served as `/v1/openapi.json`.

use super::api::{ErrorCode, Failure};
use serde_json::Value;

const DOCUMENT: &str = include_str!("openapi.yaml");

/// openapi.yaml as JSON.
pub fn document() -> Result<Value, Failure> {
    serde_yaml::from_str(DOCUMENT)
        .map_err(|error| Failure::new(ErrorCode::Internal, format!("openapi.yaml: {error}")))
}

#[cfg(test)]
#[path = "openapi_test.rs"]
mod tests;
