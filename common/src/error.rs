// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The error that a program ends with.

use thiserror::Error;

/// A device that cannot start: one line that says what is wrong and what to do.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct StartError(pub String);
