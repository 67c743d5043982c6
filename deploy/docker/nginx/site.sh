#!/bin/sh
# Makes this container's site of deploy/nginx/letta-gateway.conf: what is marked EDIT there gets the values of here.
# SERVER_NAME is the name that clients use; GATEWAYS are the gateways as address:port, OPERATORS networks of operators, with
# spaces between them.
set -eu

source=${SITE_SOURCE:-/etc/nginx/letta-gateway.conf}
site=${SITE:-/etc/nginx/conf.d/default.conf}
certificates=${SITE_CERTIFICATES:-/etc/nginx/certificates}

servers=$(mktemp)
for gateway in $GATEWAYS; do
    echo "    server $gateway max_fails=3 fail_timeout=1s;" >>"$servers"
done

operators=$(mktemp)
for network in ${OPERATORS:-}; do
    echo "    $network 1;" >>"$operators"
done

without_ipv6=
if [ ! -e /proc/net/if_inet6 ]; then
    without_ipv6='/# EDIT \(plain_\)\{0,1\}listen_ipv6/d'
fi

sed -e "$without_ipv6" \
    -e "/# EDIT gateways/r $servers" \
    -e "/# EDIT gateways/d" \
    -e "/# EDIT inside/r $operators" \
    -e "/# EDIT inside/d" \
    -e "/# EDIT \(plain_\)\{0,1\}server_name/s/server_name [^;]*;/server_name $SERVER_NAME;/" \
    -e "/# EDIT certificate/s|ssl_certificate [^;]*;|ssl_certificate $certificates/fullchain.pem;|" \
    -e "/# EDIT certificate_key/s|ssl_certificate_key [^;]*;|ssl_certificate_key $certificates/privkey.pem;|" \
    -e "/# EDIT \(plain_\)\{0,1\}access_log/s|access_log [^ ;]*|access_log /dev/stdout|" \
    "$source" >"$site"
rm "$servers" "$operators"
