// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds the vhost-user back-ends that are installed on a host, as QEMU's schema `vhost-user.json`
//! tells management software to, and checks their descriptors.

#![deny(unsafe_code)]

pub mod schema;
