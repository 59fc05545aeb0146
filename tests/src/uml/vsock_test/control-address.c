// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The control channel of vsock_test, which is TCP, uses AF_VSOCK with these in place of the C library's functions, because the guests
 * have no network. A host is a CID; 0.0.0.0 is any.
 */

#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result)
{
	static struct sockaddr_vm address;
	static struct addrinfo info;

	(void)hints;
	address.svm_family = AF_VSOCK;
	address.svm_cid = strchr(node, '.') ? VMADDR_CID_ANY : (unsigned int)strtoul(node, NULL, 10);
	address.svm_port = (unsigned int)strtoul(service, NULL, 10);
	info.ai_family = AF_VSOCK;
	info.ai_socktype = SOCK_STREAM;
	info.ai_addr = (struct sockaddr *)&address;
	info.ai_addrlen = sizeof(address);
	*result = &info;
	return 0;
}

void freeaddrinfo(struct addrinfo *info)
{
	(void)info;
}
