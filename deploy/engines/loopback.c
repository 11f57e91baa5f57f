/* Loaded into a program by LD_PRELOAD: a socket that it binds to every interface is bound to loopback.
 *
 * Beam's job servers in Java take no address for their ports, only numbers, and have no authentication. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

int bind(int socket, const struct sockaddr *address, socklen_t length) {
  int (*original)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");
  if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
    struct sockaddr_in four;
    memcpy(&four, address, sizeof four);
    if (four.sin_addr.s_addr == htonl(INADDR_ANY)) four.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return original(socket, (struct sockaddr *)&four, sizeof four);
  }
  if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
    struct sockaddr_in6 six;
    memcpy(&six, address, sizeof six);
    /* 127.0.0.1 as IPv6 writes it, which clients of both kinds reach as "localhost". */
    if (IN6_IS_ADDR_UNSPECIFIED(&six.sin6_addr)) inet_pton(AF_INET6, "::ffff:127.0.0.1", &six.sin6_addr);
    return original(socket, (struct sockaddr *)&six, sizeof six);
  }
  return original(socket, address, length);
}
