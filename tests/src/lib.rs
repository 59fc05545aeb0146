// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user front-end in user space.
