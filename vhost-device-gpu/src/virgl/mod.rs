// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! 3D with virglrenderer: the library and its renderer. The only module of this crate with unsafe code.

#![allow(unsafe_code)]

mod error;
mod export;
mod library;
mod needs;
mod probe;
mod renderer;

pub use error::VirglError;
pub use library::TransferBox;
pub use needs::{add_needs, disable_shader_cache};
pub use probe::test_draw;
pub use renderer::{Capset, Direction, Renderer, has_render_node};
