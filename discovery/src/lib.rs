// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds the vhost-user back-ends that are installed on a host, by the rules of QEMU's schema `vhost-user.json`, and checks them.
//!
//! [`directories`] lists where descriptors are, [`descriptor`] reads them, [`capabilities`] queries their programs, and [`check`] finds
//! problems with them.
//!
//! ```no_run
//! use std::time::Duration;
//! use vhost_user_discovery::{capabilities, descriptor, directories, root};
//!
//! let root = root::Root::host();
//! let directories = directories::Directories::from_environment();
//! let mut descriptors = descriptor::read(&root, &directories.all()).descriptors;
//! descriptors.retain(|descriptor| descriptor.backend.r#type == "gpu");
//! let query = capabilities::Query { time_limit: Duration::from_secs(5), stop: None };
//! let answers = capabilities::query(&root, &descriptors, query, |_| ());
//! let gpu = descriptors.iter().zip(answers).find(|(_, answer)| {
//!     answer.as_ref().is_ok_and(|capabilities| capabilities.has("virgl"))
//! });
//! ```

mod apparmor;
pub mod capabilities;
pub mod check;
pub mod descriptor;
pub mod directories;
pub mod problem;
#[cfg(feature = "cli")]
pub mod program;
pub mod root;
pub mod schema;
